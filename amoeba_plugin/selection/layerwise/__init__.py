"""Bits and sparsity layer by layer: what every unit of a model loses by each option, and which options a budget buys.

In: a dense model and calibration batches. Out: a ``LayerwisePolicy``, which quantizers and pruners of a host are told.
"""
