"""Codecs and coded images on disk. May use `evaluation` and the folders below it."""
