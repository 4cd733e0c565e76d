"""A codec or a coded image on disk. May use `evaluation` and what is below it."""
