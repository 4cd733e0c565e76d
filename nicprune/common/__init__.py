"""Errors, files, strict configuration, progress and the machine; nothing specific to torch models.
May use no other folder of this package.
"""
