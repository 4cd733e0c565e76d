"""Channels that depend on each other. May use `codecs` and what is below it."""
