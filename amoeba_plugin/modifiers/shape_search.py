"""Fields of a recipe about which shape is taken: a budget of a device, and how the best within it is searched."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.search.frontier import Frontier
from amoeba_plugin.deployment.search.run import Asked, search_elastic
from amoeba_plugin.elastic.model import ElasticModel


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
    measure: bool = True
    frontier: str | None = None

    def best(self, elastic: ElasticModel, budget: Budget, calibration: list[Batch]) -> Frontier:
        """Search the shapes of an elastic model; calibration batches are what they are judged on without a data set."""
        asked = Asked(
            self.searcher, self.dataset or "", self.split, self.num_samples, self.max_seq_length, self.measure
        )
        found = search_elastic(
            elastic, Path(self.profile), budget, asked, batches=None if self.dataset else calibration
        )
        if self.frontier is not None:
            found.save(Path(self.frontier))
        return found
