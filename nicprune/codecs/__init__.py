"""What a CompressAI model is. May use `data` and `common`."""
