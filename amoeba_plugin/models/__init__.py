"""What a decoder is: the roles of its parts, which linears share one channel axis, how weights are packed.

In: a transformers model or its configuration. Out: names, sizes and slices, by an ``ArchitectureAdapter``; an
architecture is one file in ``architectures/`` and one line in ``builtin.py``. No algorithm.
"""
