"""Keep-lists to a smaller codec: budgets, costs, masks, surgery. May use `channels` and what is
below it.
"""
