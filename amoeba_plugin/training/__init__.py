"""Training elastic models.

In: an ``ElasticModel``, what is trained of it, a data set. Out: the same model, trained for all its shapes
(``one_for_all/``).
"""
