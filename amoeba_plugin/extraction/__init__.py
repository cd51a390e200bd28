"""One shape of an elastic model as an ordinary checkpoint.

In: an ``ElasticModel`` or an elastic checkpoint, and a shape. Out: a stock transformers model, audited, with its parity
against the elastic model and a model card.
"""
