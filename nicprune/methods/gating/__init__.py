"""Channel gating: channels closed per image. May use `methods.contract` and what is below
`methods`.
"""
