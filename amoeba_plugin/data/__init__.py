"""Batches and how they come to be: calibration data, text, multiple-choice questions, padding, sharing over ranks.

In: a data set, a host's loader, a tokenizer. Out: lists of ``Batch``, drawn once, so that everything sees the same.
"""
