"""`nicprune bench`: this machine's ratios against the goals of the project. May use everything but
`cli`.
"""
