"""The supernet: one model of which exactly one shape is active, and its checkpoint.

In: a model, a ``SubnetStrategy``, perhaps an adapter. Out: an ``ElasticModel`` that switches its shape without a copy,
the configuration of any subnet, an elastic checkpoint on disk.
"""
