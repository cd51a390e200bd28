"""Which channels every width keeps, and how many: ranking by importance, allocation over layers and groups.

In: a model with statistics or gradients of it. Out: a ``WidthStrategy``.
"""
