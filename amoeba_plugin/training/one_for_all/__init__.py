"""One training for all shapes: sandwich sampling, in-place distillation, balanced losses (AmoebaLLM, section 4.3).

In: an ``ElasticModel`` with an adapter, ``OneForAllOptions``, transformers' ``TrainingArguments``. Out: the trained
model; ``trainer`` is all of it as a ``transformers.Trainer``, ``train`` one call that leaves the model as it was found.
"""
