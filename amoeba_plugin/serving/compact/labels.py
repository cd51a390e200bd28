"""What the heads learn from, by the elastic model alone: which tokens matter, and what answers a question right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amoeba_plugin.data.prompted import PromptedQuestion
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.runtime.compat import cache_name
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.serving.compact.heads import Choices
from amoeba_plugin.serving.feasible import Prompt
from amoeba_plugin.serving.reading import kept_positions


def self_information(live: ElasticModel, question: PromptedQuestion) -> Tensor:
    """Return how many nats each token of a prompt tells the smallest subnet, (tokens,), the first one none.

    What a model foresees can be left out (Selective Context, arXiv:2310.06201).
    """
    ids = _ids([question.prompt], live)
    with live.active(live.space.smallest) as model, evaluating(model), torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0, :-1].float()
    nats = functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return torch.cat([nats.new_zeros(1), nats]).cpu()


def saliency(live: ElasticModel, question: PromptedQuestion) -> Tensor:
    """Return how much each token moves the whole model's nats of the true choice, (tokens,), fp32.

    |gradient x embedding|, summed over channels.
    """
    prompt, choice = question.prompt, question.choices[question.answer]
    ids = _ids([[*prompt, *choice]], live)
    with live.active(live.space.largest) as model, evaluating(model), torch.enable_grad():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        [gradient] = torch.autograd.grad(functional.cross_entropy(logits, ids[0, len(prompt) :]), embedded)
    moved: Tensor = (gradient * embedded).detach()[0, : len(prompt)]
    return moved.float().sum(-1).abs().cpu()


SCORE_LABELS: Mapping[str, Callable[[ElasticModel, PromptedQuestion], Tensor]] = {
    "self_information": self_information,
    "saliency": saliency,
}


def shortened(question: PromptedQuestion, scores: Sequence[float], share: Fraction) -> list[int]:
    """Return the tokens of a prompt that stay at a share of its droppable ones."""
    tokens = len(question.prompt)
    count = Prompt(tokens, len(question.droppable)).kept(share)
    return [question.prompt[each] for each in kept_positions(tokens, question.droppable, scores, count)]


def answers(live: ElasticModel, prompt: Sequence[int], question: PromptedQuestion) -> bool:
    """Tell whether the active shape gives the true choice the most probability per token, behind a prompt."""
    with torch.inference_mode():
        first = live.model(_ids([prompt], live), use_cache=True, logits_to_keep=1)
    return (
        chosen(live, getattr(first, cache_name(live.model)), first.logits[0, -1], question.choices) == question.answer
    )


@torch.inference_mode()
def chosen(live: ElasticModel, cache: Any, behind: Tensor, choices: Sequence[Sequence[int]]) -> int:
    """Return which choice has the most probability per token behind a prompt that was computed.

    Args:
        live: At the shape that computed it.
        cache: Of the prompt; it is used up.
        behind: Logits behind the prompt, (vocabulary,).
        choices: In tokens.
    """
    longest = max(map(len, choices))
    rows = _ids([[*choice] + [0] * (longest - len(choice)) for choice in choices], live)
    cache.batch_repeat_interleave(len(rows))
    rest = live.model(rows, use_cache=True, **{cache_name(live.model): cache}).logits[:, :-1]
    logits = torch.cat([behind.expand(len(rows), 1, -1), rest], dim=1).float().log_softmax(-1)
    likely = [float(row[range(len(choice)), list(choice)].mean()) for row, choice in zip(logits, choices, strict=True)]
    return likely.index(max(likely))


def rightness(
    live: ElasticModel,
    questions: Sequence[PromptedQuestion],
    scores: Sequence[Sequence[float]],
    choices: Choices,
    told: Callable[[], object] = lambda: None,
) -> Tensor:
    """Return which questions are answered right, (questions, shapes, shares) bool.

    Args:
        live: The elastic model.
        questions: With their prompts.
        scores: Of the tokens of each.
        choices: Shapes and shares.
        told: Called behind every answer.
    """
    found = torch.zeros(len(questions), len(choices.shapes), len(choices.shares), dtype=torch.bool)
    for row, shape in enumerate(choices.shapes):  # a shape at a time: it is switched to once
        with live.active(str(shape)) as model, evaluating(model):
            for number, (question, score) in enumerate(zip(questions, scores, strict=True)):
                for column, share in enumerate(choices.shares):
                    found[number, row, column] = answers(live, shortened(question, score, share), question)
                    told()
    return found


def _ids(rows: Sequence[Sequence[int]], live: ElasticModel) -> Tensor:
    return torch.tensor([list(row) for row in rows], device=live.model.device)
