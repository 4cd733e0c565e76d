"""Errors, files, configuration, progress, the machine: nothing that knows torch models. May use
nothing else of this package.
"""
