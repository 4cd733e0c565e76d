"""Methods that end with keep-lists: a smaller plain codec. May use `methods.contract` and what is
below `methods`.
"""
