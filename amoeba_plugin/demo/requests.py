"""Requests with targets of their own for time, answered by one resident model, for the demo's report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from amoeba_plugin.demo.budgets import ELASTIC
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.reports.report import RequestRow
from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.backend import TorchBackend
from amoeba_plugin.serving.feasible import LatencyOf, profiled
from amoeba_plugin.serving.registry import decider_named
from amoeba_plugin.serving.service import ElasticService
from amoeba_plugin.serving.slo import Slo, Target
from amoeba_plugin.shape import ShapeSpace

PROMPT, ANSWER = 192, 16  # tokens
MIDDLE, ROOM = 0.5, 1.1  # of the way from the smallest shape's time to the whole model's; and more than the smallest's


def answered_requests(
    live: ElasticModel, profile: Profile, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]
) -> list[RequestRow]:
    """Ask the same three times: without a target, with one in the middle, with one that the smallest shape just keeps.

    Args:
        live: Answers; its largest shape is active before and after.
        profile: Of its shapes.
        tokenizer: Of the model.
        prompt: Tokens; the first ones are taken.
    """
    tokens, latency_of = list(prompt[:PROMPT]), profiled(profile, ELASTIC)
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(profile.flows[ELASTIC].threads)  # what was promised is of so many
    with ElasticService(TorchBackend(live), latency_of, decider_named("largest_feasible")) as service:
        list(service.ask(Request(tokens, most=ANSWER)))  # the first of a process takes longer
        for slo in _targets(latency_of, live.space, len(tokens)):
            answer = service.ask(Request(tokens, slo, ANSWER, best_effort=True))  # the machine may be slower by now
            said = str(tokenizer.decode([piece.token for piece in answer]))
            promised, took = answer.promised, answer.measured
            assert took is not None  # sixteen tokens are there
            rows.append(
                RequestRow(
                    slo=str(slo), shape=str(answer.decision.shape), said=said,
                    promised_ttft_ms=promised.ttft * 1e3, ttft_ms=took.ttft * 1e3,
                    promised_tpot_ms=promised.tpot * 1e3, tpot_ms=took.tpot * 1e3,
                )
            )  # fmt: skip
    live.set_shape(live.space.largest)
    torch.set_num_threads(threads)
    return rows


def _targets(latency_of: LatencyOf, space: ShapeSpace, tokens: int) -> Iterator[Slo]:
    whole = latency_of(space.largest, tokens).ttft
    least = min(latency_of(shape, tokens).ttft for shape in space)
    yield Slo()
    yield Slo(ttft=Target(least + MIDDLE * (whole - least)))
    yield Slo(ttft=Target(min(ROOM * least, whole)))
