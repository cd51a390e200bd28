"""What a fit leaves beside its directories: what was asked, what was deployed, and the result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from amoeba_plugin.deployment.search.frontier import Interval
from amoeba_plugin.deployment.within import Skipped
from amoeba_plugin.runtime.documents import Document


@dataclass(frozen=True)
class FitOptions:
    """How a fit is made.

    Attributes:
        steps: Of training; 0: none, repair alone makes up for what is cut; ``None``: as the shipped recipe has it.
        num_samples: Rows that selection sees.
        max_seq_length: Tokens of a row, everywhere.
        split: Of the data set.
        text_column: Where the text is; ``None``: ``text``, or the only column of strings.
        seed: Of everything random.
    """

    steps: int | None = None
    num_samples: int = 64
    max_seq_length: int = 256
    split: str = "train"
    text_column: str | None = None
    seed: int = 42


class Request(Document):
    """What was asked for: the same again goes on, anything else is another fit.

    Attributes:
        model: Path or hub id.
        dataset: Path or hub id.
        budget: As it is written.
        options: How the fit is made.
    """

    what: ClassVar[str] = "a record of what a fit was asked"
    model: str
    dataset: str
    budget: str
    options: FitOptions

    def differs_from(self, other: Request) -> list[str]:
        """Return in what another one differs, with its values."""
        mine, its = ({**each.model_dump(exclude={"options"}), **asdict(each.options)} for each in (self, other))
        return [f"{name} {its[name]}" for name in mine if mine[name] != its[name]]


class Deployment(Document):
    """What was deployed.

    Attributes:
        shape: Its name.
        flow: Engine and scheme.
        costs: As the budget names them: what it takes, and what is allowed.
        parity: What its engine makes of it, in a sentence.
        mean_kl: The engine's predictions from torch's in fp32, nats per token.
        skipped: Better choices that their engines refused.
        bytes: Of its files.
        ways: To run it where it lies: a title, the language, and the text of each.
    """

    what: ClassVar[str] = "a record of what a fit deployed"
    shape: str
    flow: str
    costs: dict[str, str]
    parity: str
    mean_kl: float
    skipped: list[Skipped]
    bytes: int
    ways: list[tuple[str, str, str]]


class Fitted(Document):
    """What a fit found and made.

    Attributes:
        version: Of the document.
        model: Path or hub id of the whole model.
        budget: As it is written.
        deployed: What was chosen.
        whole: Loss of the whole model on text that nothing else saw, nats per token.
        loss: Of the shape that was deployed, before its scheme.
        seconds: Wall time of the steps of the run that ended it.
    """

    what: ClassVar[str] = "a result of a fit"
    version: Literal[1] = 1
    model: str
    budget: str
    deployed: Deployment
    whole: Interval
    loss: Interval
    seconds: dict[str, float]
