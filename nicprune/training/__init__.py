"""The training loop, its optimisers and its precision. May use `pruning` and the folders below
it.
"""
