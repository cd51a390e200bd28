"""Which shape is best within a budget: costs by a profile, quality by an evaluator, few of both.

In: a `Problem`. Out: the shapes that were tried, the best of those that keep the budget, and the `Frontier`.
"""
