"""CompressAI models: zoo, anatomy, layer kinds, CDF tables, hooks. May use `data` and `common`."""
