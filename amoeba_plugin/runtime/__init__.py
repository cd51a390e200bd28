"""The machine and the hosts' machinery: files that are whole or not there, tensors on disk, ranks, FSDP, memory, hooks.

In: paths, tensors, modules, whatever they mean. Out: the same, safely. Nothing here knows a shape, a recipe or an
architecture.
"""
