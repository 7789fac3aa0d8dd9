"""What /metrics tells, in Prometheus' text format: requests and latencies seen here, and the engines' own numbers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from raytron.inference import Output, Stats

__all__ = ["CONTENT_TYPE", "Metrics", "Timer"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Metrics:
    """One registry for one application, so that several may live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r, labels = {"registry": self.registry}, ["model", "engine"]
        self.requests = Counter("raytron_requests", "Requests, by how they ended", ["model", "path", "status"], **r)
        self.prompt = Counter("raytron_prompt_tokens", "Tokens of prompts", ["model"], **r)
        self.generated = Counter("raytron_generated_tokens", "Tokens of answers", ["model"], **r)
        self.in_flight = Gauge("raytron_requests_in_flight", "Requests being answered", ["model"], **r)
        self.ttft = Histogram("raytron_time_to_first_token_seconds", "", ["model"], buckets=SECONDS, **r)
        self.tpot = Histogram("raytron_time_per_output_token_seconds", "", ["model"], buckets=PER_TOKEN, **r)
        self.whole = Histogram("raytron_request_seconds", "From the request to its last token", ["model"], **r)
        told = {
            "running": "Sequences being computed",
            "waiting": "Requests waiting",
            "kv_usage": "Share of the cache in use",
            "cached_tokens": "Prompt tokens found in the cache",
            "preemptions": "Sequences put back to be computed again",
            "version": "Version of the weights",
        }
        self.engine = {name: Gauge(f"raytron_engine_{name}", text, labels, **r) for name, text in told.items()}
        self.ready = Gauge("raytron_engine_ready", "1 while it answers", labels, **r)

    def page(self, stats: Mapping[str, Sequence[Stats]]) -> bytes:
        """The text, with the engines' numbers of this moment."""
        for gauge in (*self.engine.values(), self.ready):
            gauge.clear()
        for model, engines in stats.items():
            for number, engine in enumerate(engines):
                for name, gauge in self.engine.items():
                    gauge.labels(model, number).set(getattr(engine, name))
                self.ready.labels(model, number).set(engine.health == "ready")
        return generate_latest(self.registry)


class Timer:
    """Watches one HTTP request, until `end`.

    Attributes:
        prompt_tokens, generated_tokens, cached_tokens, version: of the answer so far.
    """

    def __init__(
        self, metrics: Metrics, model: str, path: str, prompt_tokens: int, version: int, sequences: int = 1
    ) -> None:
        self.metrics, self.model, self.path, self.version = metrics, model, path, version
        self._sequences = sequences
        self.prompt_tokens, self.generated_tokens, self.cached_tokens = prompt_tokens, 0, 0
        self.status = "abandoned"  # what it stays when the client leaves
        self._begun, self._first = time.perf_counter(), 0.0
        metrics.in_flight.labels(model).inc()

    def saw(self, outputs: Sequence[Output]) -> None:
        """Count outputs that have just come."""
        for output in outputs:
            self.generated_tokens += len(output.token_ids)
            self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
            if output.versions:
                self.version = output.versions[-1]
        if self.generated_tokens:
            self.began()

    def began(self) -> None:
        """The first token is there, now or earlier."""
        if not self._first:
            self._first = time.perf_counter()
            self.metrics.ttft.labels(self.model).observe(self._first - self._begun)

    def end(self) -> None:
        """Write everything down."""
        now, metrics, model = time.perf_counter(), self.metrics, self.model
        metrics.in_flight.labels(model).dec()
        metrics.requests.labels(model, self.path, self.status).inc()
        metrics.prompt.labels(model).inc(self.prompt_tokens)
        metrics.generated.labels(model).inc(self.generated_tokens)
        metrics.whole.labels(model).observe(now - self._begun)
        if (steps := self.generated_tokens / self._sequences - 1) > 0:
            metrics.tpot.labels(model).observe((now - self._first) / steps)
