"""Experiments: from a recipe to measured runs. May use everything but `cli` and `bench`."""
