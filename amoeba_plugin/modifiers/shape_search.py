"""Fields of a recipe about which shape is taken: a budget of a device, and how the best within it is searched."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.search.evaluators import LossJudge
from amoeba_plugin.deployment.search.frontier import Frontier
from amoeba_plugin.deployment.search.run import Asked, search_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import RecipeError
from amoeba_plugin.selection.objectives import PerTokenLoss


class SearchOptions(BaseModel):
    """How the best shape within a budget is searched.

    Attributes:
        profile: What shapes cost in the budget's engine, a JSON file; made or extended before the model loads. Default
            ``amoeba_profile.json``.
        dataset: Text that shapes are judged on, which nothing was selected or trained on: a file, a ``save_to_disk``
            directory or a hub id. Default: the calibration data, which flatters what it repaired.
        split: Of ``dataset``. Default ``train``.
        num_samples: Rows of it. Default 32.
        max_seq_length: Tokens of a row. Default 256.
        searcher: ``hierarchical``, ``exhaustive``, or a plugin's. Default ``hierarchical``.
        evaluator: What judges: ``loss``, ``accuracy`` of the questions in ``dataset``, or a plugin's. Default ``loss``.
        finalists: How many of the best are judged in the budget's engine, for what its scheme does to them. Default 6.
        measure: Run shapes whose predicted costs straddle the budget. Default true.
        frontier: Where to write what was found, a JSON file. Default: nowhere.
    """

    model_config = ConfigDict(extra="forbid")

    profile: str = "amoeba_profile.json"
    dataset: str | None = None
    split: str = "train"
    num_samples: int = Field(default=32, ge=1)
    max_seq_length: int = Field(default=256, ge=2)
    searcher: str = "hierarchical"
    evaluator: str = "loss"
    finalists: int = Field(default=6, ge=0)
    measure: bool = True
    frontier: str | None = None

    @model_validator(mode="after")
    def _questions_are_given(self) -> SearchOptions:
        if self.evaluator != "loss" and self.dataset is None:
            raise RecipeError(f"search: evaluator {self.evaluator} needs a dataset; name one, or take evaluator: loss")
        return self

    def best(self, elastic: ElasticModel, budget: Budget, calibration: list[Batch]) -> Frontier:
        """Search the shapes of an elastic model; calibration batches are what they are judged on without a data set."""
        asked = Asked(
            self.searcher, self.dataset or "", self.split, self.num_samples, self.max_seq_length, self.measure,
            evaluator=self.evaluator, finalists=self.finalists,
        )  # fmt: skip
        judge = None if self.dataset else LossJudge(elastic, PerTokenLoss(), calibration)
        found = search_elastic(elastic, Path(self.profile), budget, asked, judge=judge)
        if self.frontier is not None:
            found.save(Path(self.frontier))
        return found
