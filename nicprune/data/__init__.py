"""Images for training and testing: listing, decoding, random patches. May use `common`."""
