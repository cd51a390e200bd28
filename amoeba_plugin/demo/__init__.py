"""What ``amoeba demo`` runs: a trained language model, its corpus and its multiple-choice task, all offline.

In: a directory, a seed. Out: the shipped recipe's checkpoints there, and a report of what was gained and lost.
"""
