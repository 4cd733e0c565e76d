"""The training loop, its optimisers and its precision. May use `pruning` and what is below it."""
