"""Which layers and which channels every subnet keeps.

In: a model and calibration batches. Out: a ``DepthStrategy`` and a ``WidthStrategy``, by objectives and importances. An
objective, an importance or a depth selector is a function or class, and one line in ``builtin.py``.
"""
