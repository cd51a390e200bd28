"""What a server did, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from amoeba_http_service.asked import Asked
from amoeba_http_service.following import Following
from amoeba_http_service.resident import Resident
from amoeba_plugin.serving.slo import Slo

TTFT = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)  # seconds
TPOT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Switches(Collector):
    """How often the shape changed, as the backend counts it."""

    def __init__(self, resident: Resident) -> None:
        self._resident = resident

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield it."""
        yield CounterMetricFamily(
            "amoeba_shape_switches", "Changes of the shape between two steps.", value=self._resident.backend.switches
        )


class Metrics:
    """Counts requests of one server.

    Args:
        resident: What answers them.
    """

    def __init__(self, resident: Resident) -> None:
        self._resident, self._registry = resident, CollectorRegistry()
        of = self._registry
        self._answers = Counter(
            "amoeba_answers", "Answers, by shape and how they ended.", ["shape", "end"], registry=of
        )
        self._refused = Counter("amoeba_refused", "Requests that were refused.", ["code"], registry=of)
        self._targets = Counter(
            "amoeba_targets", "Answers with targets, by whether they kept them.", ["kept"], registry=of
        )
        self._tokens = Counter("amoeba_tokens", "Tokens: of prompts, kept of them, of answers.", ["of"], registry=of)
        self._ttft = Histogram("amoeba_ttft_seconds", "Time to the first token.", ["shape"], buckets=TTFT, registry=of)
        self._tpot = Histogram("amoeba_tpot_seconds", "Time per token behind it.", ["shape"], buckets=TPOT, registry=of)
        self._attained = Gauge(
            "amoeba_attainment_ratio", "Answers that kept their targets, of those with any.", registry=of
        )
        self._kept = self._missed = 0
        waiting = Gauge("amoeba_queue_requests", "Requests that were taken and are not done.", registry=of)
        waiting.set_function(lambda: resident.service.waiting)
        backlog = Gauge("amoeba_queue_seconds", "Seconds until they are done, by prediction.", registry=of)
        backlog.set_function(lambda: resident.service.backlog)
        of.register(Switches(resident))

    def text(self) -> bytes:
        """Return all of it in Prometheus' form."""
        return generate_latest(self._registry)

    def refused(self, code: str) -> None:
        """Count a request that was refused."""
        self._refused.labels(code).inc()

    def ended(self, asked: Asked, following: Following) -> None:
        """Count an answer that has ended; in the worker's thread alone."""
        answer, shape = following.answer, str(following.answer.decision.shape)
        end = "stop" if following.stopped else str(answer.end)
        self._answers.labels(shape, end).inc()
        self._tokens.labels("prompt").inc(len(asked.prompt.tokens))
        self._tokens.labels("kept").inc(len(answer.kept))
        self._tokens.labels("answer").inc(following.computed)
        if answer.measured is None:
            return
        self._ttft.labels(shape).observe(answer.measured.ttft)
        if answer.measured.tpot:
            self._tpot.labels(shape).observe(answer.measured.tpot)
        if asked.request.slo != Slo() and end in ("stop", "length"):
            self._count_targets(asked, following)

    def _count_targets(self, asked: Asked, following: Following) -> None:
        measured = following.answer.measured
        assert measured is not None
        limits = asked.request.slo.limits(self._resident.whole(len(asked.prompt.tokens)))
        kept = limits.kept_by(measured, following.computed)
        self._kept, self._missed = self._kept + kept, self._missed + (not kept)
        self._targets.labels("yes" if kept else "no").inc()
        self._attained.set(self._kept / (self._kept + self._missed))
