"""Adaptation of a codec to another domain, in several forms. May use what methods may use."""
