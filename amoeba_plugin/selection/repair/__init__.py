"""What is left of a model after a cut, repaired in closed form: no gradients, no labels, no new parameters.

In: a model, what was selected of it, and calibration batches. Out: ``Repairs``, weights for the linears that read what
is gone, by shape. A way to repair is a class, and one line in ``selection/builtin.py``.
"""
