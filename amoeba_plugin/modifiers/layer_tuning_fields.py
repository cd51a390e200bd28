"""Fields of AdaptiveLayerTuningModifier: the exits'."""

from __future__ import annotations

from fractions import Fraction

from pydantic import BaseModel, ConfigDict, Field, field_validator

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.training.layer_tuning.voting import RULES

QUARTERS: tuple[int | str, ...] = ("1/4", "1/2", "3/4", "1")


class ExitOptions(BaseModel):
    """Where a model can stop, and how what it says there is put together.

    Attributes:
        depths: Layers before each exit, or shares of the model's layers, ``"1/4"``; the last one is the whole model,
            ``"1"``. Default ``["1/4", "1/2", "3/4", "1"]``.
        vote: ``weighted`` (average of log-probabilities; weights and temperatures are fitted), ``maximum`` (the paper's
            rule; temperatures are fitted), or ``none``: the whole model answers. Default ``weighted``.
        agreement: Let the first exit answer alone that is so sure that this share of the held-out tokens is what all
            would have voted for; generation has no cache then. Default: all vote.
        held_out: Sequences of the text that are not trained on, for votes to be fitted on. Default 16.
    """

    model_config = ConfigDict(extra="forbid")

    depths: list[int | str] = Field(default_factory=lambda: list(QUARTERS), min_length=1)
    vote: str = "weighted"
    agreement: float | None = Field(default=None, gt=0, le=1)
    held_out: int = Field(default=16, ge=1)

    @field_validator("depths")
    @classmethod
    def _depths_are_layers_or_shares(cls, depths: list[int | str]) -> list[int | str]:
        for depth in depths:
            try:
                possible = Fraction(depth) > 0 and (isinstance(depth, int) or Fraction(depth) <= 1)
            except (ValueError, ZeroDivisionError):
                possible = False
            if not possible:
                raise RecipeError(f"exits.depths has {depth!r}; give numbers of layers, or shares of the model's, 1/4")
        return depths

    @field_validator("vote")
    @classmethod
    def _vote_exists(cls, vote: str) -> str:
        if vote not in (*RULES, "none"):
            raise RecipeError(f"exits.vote '{vote}' is unknown; choose one of {', '.join(RULES)}, none")
        return vote

    def of(self, layers: int) -> tuple[int, ...]:
        """Return the depths in a model of so many layers, ascending.

        >>> ExitOptions().of(30)
        (8, 15, 22, 30)

        Raises:
            RecipeError: If two are the same, one is deeper than the model, or the whole model is not among them.
        """
        found = sorted(depth if isinstance(depth, int) else round(Fraction(depth) * layers) for depth in self.depths)
        if len(set(found)) < len(self.depths) or found[0] < 1 or found[-1] != layers:
            raise RecipeError(
                f"exits.depths {', '.join(map(str, self.depths))} are {', '.join(map(str, found))} of {layers} layers; "
                f'give different ones from 1 on, of which the deepest is the whole model: {layers}, or the share "1"'
            )
        return tuple(found)
