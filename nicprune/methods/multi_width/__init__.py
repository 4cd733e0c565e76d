"""Several widths, or several encoders, in one codec. May use `methods.contract` and what is below
`methods`.
"""
