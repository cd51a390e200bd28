"""What a run gained and lost: one model of the results, which is written as JSON."""

from __future__ import annotations

import statistics
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.search.frontier import Frontier
from amoeba_plugin.deployment.within import Skipped
from amoeba_plugin.selection.layerwise.policy import LayerwisePolicy

REPORT_JSON = "report.json"
LEAST_GAP = 1e-6  # nats per token; what is less is rounding


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quality(_Row):
    """How well a model does on held-out text.

    Attributes:
        loss: Cross-entropy, nats per token.
        perplexity: exp(loss).
        accuracy: Share of multiple-choice questions answered right, in [0, 1].
    """

    loss: float
    perplexity: float
    accuracy: float


class ShapeRow(_Row):
    """What one subnet, or the dense model, takes and how good it is.

    Attributes:
        shape: DEPTHxWIDTH.
        parameters: Of the whole model, tied tensors counted once.
        block_share: Parameters of its decoder layers as a share of the dense model's, in (0, 1].
        checkpoint_bytes: Of all files of weights.
        before: Quality after selection alone; for the dense model, its quality.
        after: Quality with the one-for-all adapter folded in; ``None`` where nothing was trained.
        prefill_ms: Milliseconds to read the prompt, median of several measurements.
        decode_ms: Milliseconds per generated token, median of several measurements.
    """

    shape: str
    parameters: int
    block_share: float
    checkpoint_bytes: int
    before: Quality
    after: Quality | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None

    @property
    def best(self) -> Quality:
        """Quality of the finished subnet: after training, where there was any."""
        return self.after or self.before


class DepthRow(_Row):
    """One way to choose layers, at one depth.

    Attributes:
        selector: Its name, for people.
        depth: Layers kept.
        kept_layers: Their indices in the dense model, ascending.
        objective: The objective on the selection data, where smaller is better unless ``Report.larger_is_better``.
        held_out_loss: Nats per token on text that selection did not see.
    """

    selector: str
    depth: int
    kept_layers: list[int]
    objective: float
    held_out_loss: float


class QuantizedRow(_Row):
    """The quantized subnet beside its unquantized self.

    Attributes:
        shape: DEPTHxWIDTH.
        scheme: What was done, in words.
        checkpoint_bytes: Of all files of weights.
        quality: Measured on the reloaded checkpoint.
        unquantized_bytes: Of the same subnet before quantization.
        unquantized: Its quality before quantization.
        mean_kl_divergence: Of the quantized from the unquantized subnet's predictions, nats per token.
    """

    shape: str
    scheme: str
    checkpoint_bytes: int
    quality: Quality
    unquantized_bytes: int
    unquantized: Quality
    mean_kl_divergence: float | None = None


class DeployedRow(_Row):
    """A subnet as its engine runs it.

    Attributes:
        shape: DEPTHxWIDTH.
        flow: Engine and scheme.
        bytes: Of all its files.
        parity: What its engine makes of it, in words.
        directory: Where it lies.
        ways: To run it there: a title, the language, and the text of each.
        skipped: Better choices that their engines refused.
    """

    shape: str
    flow: str
    bytes: int
    parity: str
    directory: str
    ways: list[tuple[str, str, str]]
    skipped: list[Skipped] = []


class BudgetRow(_Row):
    """What a search within a budget found, and what was made of it.

    Attributes:
        frontier: Every choice that was tried, and the best.
        deployed: That was deployed, and proved by its engine.
    """

    frontier: Frontier
    deployed: DeployedRow


class RequestRow(_Row):
    """One request to a resident model, and its answer.

    Attributes:
        slo: Its targets, in words.
        shape: That answered it.
        said: The answer.
        promised_ttft_ms: Milliseconds to the first token, by the profile.
        ttft_ms: Measured.
        promised_tpot_ms: Milliseconds of each token behind it, by the profile.
        tpot_ms: Measured.
    """

    slo: str
    shape: str
    said: str
    promised_ttft_ms: float
    ttft_ms: float
    promised_tpot_ms: float
    tpot_ms: float


class Provenance(_Row):
    """How the figures came about, so that somebody else can come to them.

    Attributes:
        seed: Of everything random.
        created: Date and time, ISO 8601.
        hardware: What it ran on, in words.
        versions: Version by package, Python among them.
        stage_seconds: Seconds by stage, in order.
        peak_memory_bytes: Largest resident size of the process; ``None`` where the system does not tell.
        data: What was measured on which text, in words, by purpose.
    """

    seed: int
    created: str
    hardware: str
    versions: dict[str, str]
    stage_seconds: dict[str, float]
    peak_memory_bytes: int | None = None
    data: dict[str, str] = Field(default_factory=dict)


class Report(_Row):
    """Everything the demo shows.

    Attributes:
        format: Always ``amoeba_plugin.Report``.
        version: Of the format; raised when a field changes its meaning.
        title: What was compressed, as a headline.
        dense: The untouched model, which subnets are compared with.
        shapes: Subnets, largest first.
        depth_selectors: Ways to choose layers, compared at the same depths.
        objective: What the dynamic program optimised, with its unit.
        larger_is_better: Whether a larger objective is a better model.
        quantized: ``None`` where nothing was quantized.
        policy: Bits of the dense model, layer by layer; ``None`` where none were chosen.
        budgets: The best subnets within budgets of this machine.
        profile: What shapes cost on it; ``None`` where that was not measured.
        requests: The same prompt under several targets for time.
        provenance: How the figures came about.
    """

    format: Literal["amoeba_plugin.Report"] = "amoeba_plugin.Report"
    version: Literal[1] = 1
    title: str
    dense: ShapeRow
    shapes: list[ShapeRow]
    depth_selectors: list[DepthRow] = Field(default_factory=list)
    objective: str = "loss, nats per token"
    larger_is_better: bool = False
    quantized: QuantizedRow | None = None
    policy: LayerwisePolicy | None = None
    budgets: list[BudgetRow] = Field(default_factory=list)
    profile: Profile | None = None
    requests: list[RequestRow] = Field(default_factory=list)
    provenance: Provenance

    def gap_before(self, row: ShapeRow) -> float:
        """Held-out loss above the dense model's after selection alone, nats per token."""
        return row.before.loss - self.dense.before.loss

    def gap_after(self, row: ShapeRow) -> float | None:
        """Held-out loss above the dense model's after one-for-all training, nats per token."""
        return None if row.after is None else row.after.loss - self.dense.before.loss

    def gap_closed(self, row: ShapeRow) -> float | None:
        """Share of the gap that training closed; ``None`` where there was none to close."""
        before, after = self.gap_before(row), self.gap_after(row)
        return None if after is None or before <= LEAST_GAP else 1 - after / before

    def median_gap_closed(self) -> float | None:
        """Median of :meth:`gap_closed` over the shapes that had a gap; ``None`` where none had."""
        closed = [value for row in self.shapes if (value := self.gap_closed(row)) is not None]
        return statistics.median(closed) if closed else None

    def best_selectors(self) -> dict[int, DepthRow]:
        """Return, for each depth compared, the selector that is best on the objective."""
        sign = -1 if self.larger_is_better else 1
        depths = sorted({row.depth for row in self.depth_selectors}, reverse=True)
        return {
            depth: min(
                (row for row in self.depth_selectors if row.depth == depth), key=lambda row: sign * row.objective
            )
            for depth in depths
        }
