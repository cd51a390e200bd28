"""How a search is to be made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asked:
    """How a search is to be made.

    Attributes:
        searcher: Its name.
        dataset: What shapes are judged on: text, or questions.
        split: Of the data set.
        num_samples: Rows, or questions.
        max_seq_length: Tokens of a row, at most.
        measure: Whether shapes whose predicted costs straddle the budget are run.
        foreign: Whether the profile may be of another machine, on which nothing can be measured then.
        evaluator: What judges shapes: its name.
        finalists: How many of the best are measured in their engine, for what the scheme does to them; 0: none.
        letters: Whether questions list their choices by letter and ask for the letter.
        trials: How many choices ``nsga2`` tries.
        storage: File in which it keeps them: the same search goes on from there, and several processes share it.
    """

    searcher: str
    dataset: str
    split: str = "train"
    num_samples: int = 32
    max_seq_length: int = 256
    measure: bool = True
    foreign: bool = False
    evaluator: str = "loss"
    finalists: int = 6
    letters: bool = True
    trials: int = 100
    storage: Path | None = None
