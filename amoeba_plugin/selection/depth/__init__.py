"""Which layers every depth keeps: the paper's dynamic program, run on all subnets at once, and the published selectors.

In: a ``DepthTask`` (model, adapter, objective, calibration batches). Out: a ``DepthStrategy``.
"""
