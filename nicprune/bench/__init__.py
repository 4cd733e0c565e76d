"""`nicprune bench`: ratios on this machine beside the project's goals. May use everything but
`cli`.
"""
