"""Fast execution of trained codecs: exact rewrites of layers, and backends. May use `storage` and
what is below it.
"""
