"""A tuned model whose exits vote, behind the call and the ``generate`` of the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.errors import ArtifactError, DataError, RecipeError
from amoeba_plugin.runtime.module_calls import answering, input_device
from amoeba_plugin.selection.hidden_states import watched
from amoeba_plugin.training.head_loss import HeadLoss
from amoeba_plugin.training.layer_tuning.exits import Begun, Exits, noting_tuples
from amoeba_plugin.training.layer_tuning.files import load_tuned
from amoeba_plugin.training.layer_tuning.voting import Votes, fit_threshold, fit_votes
from amoeba_plugin.training.next_token import RowLoss, target_positions

VOTES_NAME = "votes.json"
OF_THE_CACHE = ("past_key_values", "use_cache", "cache_position", "attention_mask", "labels")


class VotingModel:
    """Answers with what the exits of a model vote for; ``logits`` are log-probabilities.

    Example::

        voting = VotingModel.fitted(model, exits, held_out)
        voting.generate(**tokenizer("Once upon", return_tensors="pt"), max_new_tokens=20)

    Args:
        model: A tuned model, or the adapter on it.
        exits: Of it.
        votes: How they vote. With a threshold, a call ends at the first exit that is sure at every position asked for;
            the keys and values of the layers above it are missing then, so that ``generate`` takes no cache.

    Attributes:
        answered: The depth at which the last call ended.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, exits: Exits, votes: Votes) -> None:
        if not set(votes.depths) <= set(exits.depths):
            raise ArtifactError(
                f"votes are of exits at {', '.join(map(str, votes.depths))}, and the model has "
                f"{', '.join(map(str, exits.depths))}: they belong to another model"
            )
        self.model, self.exits, self.votes = model, exits, votes
        self.answered = votes.depths[-1]

    @classmethod
    def fitted(
        cls,
        model: PreTrainedModel | PeftModel,
        exits: Exits,
        held_out: Sequence[Batch],
        rule: str = "weighted",
        agreement: float | None = None,
        positions: int = 500,
    ) -> Self:
        """Return a model whose votes are fitted on text that nothing was trained on.

        Args:
            model: A tuned model, or the adapter on it.
            exits: Of it.
            held_out: Batches with ``labels``.
            rule: How exits vote.
            agreement: Let the first exit answer alone that is so sure that this share of the positions has the token
                that all would have voted for; ``None``: all vote.
            positions: How many are looked at; memory holds the logits of every exit there.

        Raises:
            DataError: If there is no position with a label.
        """
        logits, labels = logits_of_exits(model, exits, held_out, positions)
        votes = fit_votes(exits.depths, logits, labels, rule)
        return cls(model, exits, votes if agreement is None else fit_threshold(votes, logits, agreement))

    @classmethod
    def from_pretrained(cls, directory: Path, base: str | None = None, **how: Any) -> Self:
        """Load what :meth:`save_pretrained` wrote; arguments are those of ``load_tuned``.

        Raises:
            ArtifactError: If there is no such model, or its votes are damaged.
        """
        model, exits = load_tuned(directory, base, **how)
        return cls(model, exits, Votes.load(directory / VOTES_NAME))

    def save_pretrained(self, directory: Path) -> None:
        """Write the model, or its adapter, and the votes beside it."""
        self.model.save_pretrained(str(directory))
        self.votes.save(directory / VOTES_NAME)

    def __call__(self, **inputs: Any) -> CausalLMOutputWithPast:
        """Return the vote: ``logits`` (batch, positions, vocabulary) fp32, log-probabilities; no gradient."""
        with self._voting(), torch.no_grad():
            model: Any = self.model
            output: CausalLMOutputWithPast = model(**inputs)
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does: greedily, by beams, by sampling, in batches, with a cache.

        Raises:
            RecipeError: If a cache is asked for where there is none: exits answer alone, or several branches vote.
        """
        reason = self._without_cache()
        if reason:
            if kwargs.get("use_cache"):
                raise RecipeError(
                    f"{reason}; generate with use_cache=False, or save_exit and generate by one exit alone"
                )
            kwargs["use_cache"] = False
        with self._voting():
            generate: Any = self.model.generate
            return generate(*args, **kwargs)

    def _without_cache(self) -> str:
        """Say why generation has no cache; else ""."""
        if self.votes.threshold is not None:
            return "an exit that answers alone leaves layers above it without keys and values"
        if self._branched:
            return "exits that are branches have keys and values of their own, which one cache does not hold"
        return ""

    @property
    def _branched(self) -> bool:
        """Whether several exits vote that have only the base in common."""
        return not self.exits.stacked and len(self.votes.depths) > 1

    @contextmanager
    def _voting(self) -> Iterator[None]:
        inner = self.exits.model
        forward = inner.forward
        answer = self._branches if self._branched else self._cached
        if self.votes.threshold is not None:
            answer = self._first_sure

        def voted(*args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
            if args:
                kwargs["input_ids"] = args[0]
            with answering(inner, forward):
                return answer(inner, kwargs)

        voted.__wrapped__ = forward  # type: ignore[attr-defined]  # generate looks at the signature
        with self.exits.active(self.votes.depths[-1]), answering(inner, voted):
            yield

    def _branches(self, inner: PreTrainedModel, inputs: dict[str, Any]) -> CausalLMOutputWithPast:
        places = zip(self.exits.depths, self.exits.begun(_bare(inputs)), strict=True)
        seen = [self._from(depth, begun, inputs) for depth, begun in places if depth in self.votes.depths]
        self.answered = self.votes.depths[-1]
        return _output(self.votes.combined(torch.stack(seen)))

    def _cached(self, inner: PreTrainedModel, inputs: dict[str, Any]) -> CausalLMOutputWithPast:
        *below, deepest = self.votes.depths
        with ExitStack() as stack:
            flows = [stack.enter_context(watched(self.exits.layers[depth - 1])) for depth in below]
            kinds = stack.enter_context(noting_tuples(self.exits.layers[0]))
            output = inner(**{name: value for name, value in inputs.items() if name != "labels"})
        places = [Begun(depth, flow[0][1], kinds[0]) for depth, flow in zip(below, flows, strict=True)]
        logits = [self._from(begun.first, begun, inputs) for begun in places]
        self.answered = deepest
        voted = self.votes.combined(torch.stack([*logits, output.logits]))
        return _output(voted, output.get("past_key_values"))

    def _first_sure(self, inner: PreTrainedModel, inputs: dict[str, Any]) -> CausalLMOutputWithPast:
        assert self.votes.threshold is not None
        seen: list[Tensor] = []
        begun: Begun | None = None
        for number, depth in enumerate(self.votes.depths):
            start = depth if self.exits.stacked else self.exits.branch(depth)
            if start:
                (states,), in_tuples = self.exits.states(_bare(inputs), [start], begun)
                begun = Begun(start, states, in_tuples)
            seen.append(self._from(depth, begun, inputs))
            sure, _ = self.votes.confidence(number, seen[-1])
            if depth != self.votes.depths[-1] and bool((sure > self.votes.threshold).all()):
                self.answered = depth
                return _output(self.votes.alone(number, seen[-1]))
        self.answered = self.votes.depths[-1]
        return _output(self.votes.combined(torch.stack(seen)))

    def _from(self, depth: int, begun: Begun | None, inputs: dict[str, Any]) -> Tensor:
        """Return an exit's logits, from where it has come to."""
        with self.exits.going_on(depth, begun) as model:
            if begun is not None and begun.first == depth:  # no layer is left, and a cache is of no concern
                bare = {name: value for name, value in inputs.items() if name not in OF_THE_CACHE}
            else:
                bare = _bare(inputs) | {name: inputs[name] for name in ("logits_to_keep",) if name in inputs}
            logits: Tensor = model(**bare, use_cache=False).logits
        return logits


def _bare(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a forward of all layers without a cache, whose head is not asked."""
    without = {"past_key_values", "use_cache", "cache_position", "labels", "logits_to_keep"}
    return {name: value for name, value in inputs.items() if name not in without and value is not None}


def _output(logits: Any, cache: Any = None) -> CausalLMOutputWithPast:
    return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def _keeping(rows: list[Tensor]) -> RowLoss:
    """Return what keeps the logits that it is called with, and calls them no loss."""

    def keep(logits: Tensor, place: slice) -> Tensor:
        rows.append(logits)
        return 0 * logits[:, 0]  # differentiable, as a loss is

    return keep


@torch.no_grad()
def logits_of_exits(
    model: PreTrainedModel | PeftModel, exits: Exits, batches: Sequence[Batch], positions: int
) -> tuple[Tensor, Tensor]:
    """Return every exit's logits, (exits, n, vocabulary), and the next tokens, (n,), at the first positions of batches.

    Raises:
        DataError: If there is no position with a label.
    """
    head_loss, left = HeadLoss(exits.model), positions
    found: list[Tensor] = []
    labels: list[Tensor] = []
    device = input_device(exits.model)
    model.eval()
    for batch in batches:
        if left <= 0:
            break
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        places = target_positions(batch["labels"].to(device))
        if not places.num_targets:
            continue
        kept = []
        for depth, begun in zip(exits.depths, exits.begun(inputs), strict=True):
            rows: list[Tensor] = []
            with exits.going_on(depth, begun) as stopped:
                head_loss(stopped, inputs, places, _keeping(rows))
            kept.append(torch.cat(rows)[:left])
        found.append(torch.stack(kept))
        labels.append(places.labels[:left])
        left -= len(labels[-1])
    if not found:
        raise DataError("no position of the held-out text has a label; give batches with labels")
    return torch.cat(found, dim=1), torch.cat(labels)
