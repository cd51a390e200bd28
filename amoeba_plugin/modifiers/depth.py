"""DepthShrinkingModifier: which layers every depth keeps, as a recipe step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from typing import Any, Literal

from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.calibration import require_disjoint
from amoeba_plugin.data.multiple_choice import QuestionColumns, load_questions
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.errors import ArchitectureError, DataError, RecipeError
from amoeba_plugin.modifiers.order import require_session_order
from amoeba_plugin.modifiers.selection import NO_REPAIR, Selection, on_main_device, selection_for
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.selection.depth.steps import Granularity
from amoeba_plugin.selection.depth.task import DepthTask, SearchOptions
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.registry import depth_selector_named, objective_named
from amoeba_plugin.selection.repair.fold_table import FoldTable, parted
from amoeba_plugin.shape import half_steps, parse_width, require_distinct_depths

logger = logging.getLogger(__name__)


class QuestionOptions(BaseModel):
    """A multiple-choice data set for the objective ``accuracy``; see :mod:`amoeba_plugin.data.multiple_choice`.

    Attributes:
        dataset: A directory, a file or a hub id. No default.
        split: Split that selection sees. Default ``validation``.
        report_split: Another split: the accuracy of every depth found is measured on it, logged, and noted in the
            provenance. Default: none is measured.
        num_questions: Questions drawn of each split, evenly over subjects. Default 320 (reference code).
        question_column: Text of the question. Default ``question``.
        choices_column: List of texts, or a mapping with ``text`` and ``label``. Default ``choices``.
        answer_column: Index, letter, label or text of the true choice. Default ``answer``.
        subject_column: What questions are stratified by, where there is one. Default ``subject``.
        letters: List the choices with letters and ask for the letter, as MMLU does; else for the text. Default true.
        shots: Answered questions in front of each. Default 0; the paper has 5.
        shots_split: Split they come from, another than the others. Default ``dev``.
        max_seq_length: Tokens; a longer question loses shots first. Default 2048.
        batch_size: Choices per batch. Default 8.
        seed: Of the draw. Default 42.
    """

    model_config = ConfigDict(extra="forbid")

    dataset: str
    split: str = "validation"
    report_split: str | None = None
    num_questions: int = Field(default=320, ge=1)
    question_column: str = "question"
    choices_column: str = "choices"
    answer_column: str = "answer"
    subject_column: str = "subject"
    letters: bool = True
    shots: int = Field(default=0, ge=0)
    shots_split: str = "dev"
    max_seq_length: int = Field(default=2048, ge=2)
    batch_size: int = Field(default=8, ge=1)
    seed: int = 42

    @model_validator(mode="after")
    def _splits_differ(self) -> QuestionOptions:
        if self.report_split == self.split:
            raise RecipeError(
                f"questions: selection and report both use split '{self.split}', so that the figure would flatter the "
                "selection; name two splits, such as validation and test"
            )
        if self.shots and self.shots_split in (self.split, self.report_split):
            raise RecipeError(
                f"questions: the shots come from split '{self.shots_split}', whose questions are asked too; name "
                "another shots_split, such as dev or train"
            )
        return self

    def load(self, tokenizer: PreTrainedTokenizerBase, split: str, vocab_size: int) -> list[Batch]:
        """Return the batches of one split, of the tokens of a model."""
        return load_questions(
            self.dataset,
            tokenizer,
            split=split,
            num_questions=self.num_questions,
            vocab_size=vocab_size,
            seed=self.seed,
            columns=QuestionColumns(self.question_column, self.choices_column, self.answer_column, self.subject_column),
            letters=self.letters,
            shots=self.shots,
            shots_split=self.shots_split,
            max_seq_length=self.max_seq_length,
            batch_size=self.batch_size,
        )


class DepthShrinkingModifier(Modifier):
    """Find, for every depth, which layers to keep (AmoebaLLM, arXiv:2411.10606, section 4.1).

    Sample YAML::

        select_stage:
          amoeba_select_modifiers:
            DepthShrinkingModifier: {min_depth: 20, keep_last: 1, objective: loss}

    Attributes:
        min_depth: Layers the smallest subnet keeps, or the share of the model's layers that it keeps, ``2/3``, rounded
            up. No default, but with ``depths`` the least of them.
        depths: Layers that subnets keep, of all numbers down to ``min_depth``; each has weights and time of its own.
            Default: all.
        keep_last: Last layers that are never removed. Default 1, as in the paper.
        selector: A search, ``dynamic_program`` (the paper's), ``greedy`` (SLEB), ``lazy_greedy`` (nearly the same,
            with fewer measurements), or ``auto`` (the best of all three and of published selectors, for at most 2.2
            times greedy's layer-forwards); or a published ranking: ``block_influence`` (ShortGPT), ``one_shot``,
            ``taylor``, ``taylor_plus``, ``magnitude``, ``magnitude_plus`` (Shortened LLaMA), ``angular_distance``,
            ``last_layers`` (Gromov et al.); or a plugin's. Default ``auto``.
        objective: ``loss`` (mean nats per token), ``perplexity``, ``accuracy`` (multiple choice), or a plugin's.
            Default ``loss``.
        beam: With ``dynamic_program`` and ``auto``: sets of layers that each state of the program keeps; 1 is the
            paper, more find better layers in up to ``beam`` times the time. Default 1.
        exchanges: With a search: rounds after it, in each of which every depth tries to exchange
            one removed layer for one kept; 0 is the paper. Default 0.
        granularity: With a search: ``layer``, or ``sublayer``: attention and MLP of a layer go apart, each
            half a layer of depth (``shape: 10.5x7/8``). Default ``layer``, as in the paper.
        cache_gib: With a search: GiB of hidden states held in memory, and on an accelerator as much again on
            the CPU; the rest is held in files. Default 4.
        resume_dir: With a search: a directory that keeps every score, so that a killed search goes on where
            it was. Default ``None``.
        questions: With ``accuracy``: questions to select on, in place of the calibration data; see
            :class:`QuestionOptions`. Default: the calibration data holds them.
        repair: ``least_squares``: what removed layers added is folded into the MLP of the layer in front of them, which
            so has a weight of its own at that depth; or ``none``. Architectures with norms behind the MLP, mixtures of
            experts, packed weights, and depths that lose sublayers, stay as they are cut. Searches measure candidates
            so repaired, on an eighth of the calibration data (8 rows at least), by what the rest says.
            Default ``least_squares``.
        max_batches: Batches that candidates are measured on, ``None`` for all. Default ``None``.
        kept_layers: Per depth, the layers to keep; ``2.mlp`` keeps layer 2 without its attention. Given: nothing is
            searched. Else filled in by the search, so that the recipe written beside a checkpoint repeats its
            selection.
    """

    min_depth: int | str | None = None
    depths: list[int] | None = None
    keep_last: int = Field(default=1, ge=0)
    selector: str = "auto"
    objective: str = "loss"
    beam: int = Field(default=1, ge=1)
    exchanges: int = Field(default=0, ge=0)
    granularity: Granularity = "layer"
    cache_gib: float = Field(default=4.0, gt=0)
    resume_dir: str | None = None
    questions: QuestionOptions | None = None
    repair: Literal["least_squares", "none"] = "least_squares"
    max_batches: int | None = Field(default=None, ge=1)
    kept_layers: dict[str, list[int | str]] | None = None

    @field_validator("min_depth", mode="before")
    @classmethod
    def _depth_or_share(cls, least: Any) -> int | str | None:
        if least is None:
            return None
        if isinstance(least, str) and "/" in least:
            return str(parse_width(least))
        if isinstance(least, bool) or not str(least).strip().isdecimal() or int(least) < 1:
            raise RecipeError(
                f"min_depth {least!r} is impossible; give a number of layers from 1 on, or a share of the model's, 2/3"
            )
        return int(least)

    @field_validator("kept_layers", mode="before")
    @classmethod
    def _depths_are_text(cls, kept: Any) -> Any:
        """Take depths that YAML reads as numbers: ``{2: [0, 3]}`` is what it looks like."""
        if not isinstance(kept, dict):
            return kept
        require_distinct_depths(kept)
        return {str(depth): layers for depth, layers in kept.items()}

    @field_validator("objective")
    @classmethod
    def _objective_exists(cls, name: str) -> str:
        objective_named(name)
        return name

    @field_validator("selector")
    @classmethod
    def _selector_exists(cls, name: str) -> str:
        depth_selector_named(name)
        return name

    @model_validator(mode="after")
    def _depths_are_told(self) -> DepthShrinkingModifier:
        if self.min_depth is None and not self.depths:
            raise RecipeError("DepthShrinkingModifier has no min_depth; give the layers that the smallest subnet keeps")
        if self.depths is not None and (min(self.depths, default=0) < 1 or self.kept_layers is not None):
            raise RecipeError(
                f"depths {self.depths} are impossible; give numbers of layers from 1 on, of a search that is to come"
            )
        if self.min_depth is None and self.depths:
            self.min_depth = min(self.depths)
        if isinstance(self.min_depth, int) and self.depths and min(self.depths) < self.min_depth:
            raise RecipeError(f"depths {self.depths} go below min_depth {self.min_depth}; leave min_depth out")
        return self

    @model_validator(mode="after")
    def _questions_want_accuracy(self) -> DepthShrinkingModifier:
        if self.questions is not None and self.objective != "accuracy":
            raise RecipeError(f"questions mean nothing to objective {self.objective}; take objective: accuracy")
        return self

    @model_validator(mode="after")
    def _options_belong_to_the_selector(self) -> DepthShrinkingModifier:
        taken = depth_selector_named(self.selector).options
        for name in depth_selector_named("dynamic_program").options:
            if name not in taken and getattr(self, name) != type(self).model_fields[name].default:
                raise RecipeError(
                    f"{name} means nothing to selector {self.selector}: it is the dynamic program's; leave it out, or "
                    "take selector: dynamic_program or auto"
                )
        return self

    def least_depth(self, layers: int) -> int:
        """Return the layers that the smallest subnet of a model keeps.

        >>> DepthShrinkingModifier(min_depth="2/3").least_depth(32)
        22
        """
        least = self.min_depth
        assert least is not None  # of depths the least
        return least if isinstance(least, int) else math.ceil(Fraction(least) * layers)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Search on the calibration data, or take the layers given."""
        require_session_order(self)
        selection = selection_for(state)
        selection.depth_repair = self.repair != NO_REPAIR
        selection.repair_asked |= selection.depth_repair and "repair" in self.model_fields_set
        if self.kept_layers is None:
            with on_main_device(state.model), selection.timed("depth search"):
                selection.depth = self._searched(selection, state.model)
            self.kept_layers = selection.depth.table
            _tell(selection.depth)
        else:
            layers = len(selection.adapter.layers(state.model))
            selection.depth = DepthStrategy.given(self.kept_layers, layers)
        return True

    def _searched(self, selection: Selection, model: PreTrainedModel) -> DepthStrategy:
        batches, reported = self._data(selection, model.config)
        selector, objective = depth_selector_named(self.selector), objective_named(self.objective)
        with ExitStack() as stack:
            folds = None
            if selector.folds and self.repair != NO_REPAIR and self.granularity == "layer" and objective.is_separable:
                fitting, judging = (selection.batches, batches) if self.questions else parted(selection.batches)
                folds = stack.enter_context(self._folds(selection, model, fitting if judging else []))
                batches = batches if folds is None else judging
            found = selector.select(
                DepthTask(
                    model,
                    selection.adapter,
                    objective,
                    batches[: self.max_batches],
                    min_depth=self.least_depth(len(selection.adapter.layers(model))),
                    keep_last=self.keep_last,
                    options=SearchOptions(**{name: getattr(self, name) for name in selector.options}),
                    folds=folds,
                )
            )
        if self.depths is not None:
            found = found.only(self.depths)
        if reported:
            selection.on_elastic.append(partial(self._report, selection, reported))
        return found

    @contextmanager
    def _folds(self, selection: Selection, model: PreTrainedModel, fitting: list[Batch]) -> Iterator[FoldTable | None]:
        """Yield what candidates are repaired by; ``None`` where they cannot be, or too little data is left for it."""
        try:
            runs = LayerRuns.of(model, selection.adapter, fitting, self.cache_gib)
        except (ArchitectureError, DataError):  # told when what was selected is to be repaired
            yield None
            return
        with FoldTable.of(runs) as folds:
            yield folds

    def _data(self, selection: Selection, config: PretrainedConfig) -> tuple[list[Batch], list[Batch]]:
        """Return the batches to select on and those to report on."""
        if self.questions is None:
            return selection.batches, []
        tokenizer = load_tokenizer(str(config.name_or_path))
        batches = self.questions.load(tokenizer, self.questions.split, config.vocab_size)
        if self.questions.report_split is None:
            return batches, []
        reported = self.questions.load(tokenizer, self.questions.report_split, config.vocab_size)
        require_disjoint(batches, reported)
        return batches, reported

    def _report(self, selection: Selection, reported: list[Batch], elastic: ElasticModel) -> None:
        assert self.questions is not None
        accuracy = {}
        for depth in elastic.space.depths:
            with elastic.active(f"{depth}x1") as model, on_main_device(model):
                accuracy[str(depth)] = objective_named("accuracy").measure(model, reported).value
            logger.info("depth %s answers %.1f %% of split %s right", depth, 100 * accuracy[str(depth)],
                        self.questions.report_split)  # fmt: skip
        selection.provenance["accuracy"] = {"split": self.questions.report_split, "by depth": accuracy}


def _tell(depths: DepthStrategy) -> None:
    """Log what every depth removes, and what was measured without it."""
    whole = depths.metric.get(depths.num_layers)
    for depth in sorted(depths.kept, reverse=True)[1:]:
        removed, value = ", ".join(map(str, depths.removed(depth))), depths.metric.get(depth)
        measured = "" if value is None else f": {depths.objective} {value:.4g}"
        of_whole = "" if value is None or whole is None else f", of the whole model {whole:.4g}"
        logger.info("depth %s is without %s%s%s", half_steps(depth), removed, measured, of_whole)
