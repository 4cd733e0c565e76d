"""What a codec achieves and what it costs in time and memory. May use `methods` and what is below
it.
"""
