"""Photographs: images and patches. May use `common`."""
