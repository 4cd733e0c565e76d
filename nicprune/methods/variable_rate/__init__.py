"""Modulators: one codec for many rates. May use `methods.contract` and what is below `methods`."""
