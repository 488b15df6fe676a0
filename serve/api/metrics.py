"""GET /metrics: metrics of the server in Prometheus' text format.

Counters and histograms are updated after each response from its `RequestContext`. Values of the
engines are read on each scrape. Each server has its own `CollectorRegistry`, so that two servers in
one process count separately.
"""

from collections.abc import Iterable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from serve.api.request_context import context_of
from serve.jobs.batches import FINISHED, UNFINISHED, Batches
from serve.models.decoder import DecoderModel
from serve.models.registry import Registry

disable_created_metrics()  # no `_created` series beside each counter

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The Prometheus metrics of one server: counters, histograms and engine statistics.

    Args:
        registry: The models, whose engines are read on each scrape.
        batches: The batches, which are counted on each scrape.
    """

    def __init__(self, registry: Registry, batches: Batches):
        self._collectors = CollectorRegistry()
        ProcessCollector(registry=self._collectors)
        self._collectors.register(_EngineCollector(registry))
        self._collectors.register(_BatchCollector(batches))
        route = ("method", "route", "status")
        self._requests = self._counter("requests", "Requests served.", route)
        self._request_seconds = self._histogram(
            "request_seconds",
            "Time from a request's arrival to the end of its response.",
            ("route",),
        )
        self._in_progress = Gauge(
            "pellucid_requests_in_progress", "Requests being served.", registry=self._collectors
        )
        model = ("model",)
        self._prompt = self._counter("prompt_tokens", "Prompt tokens.", model)
        self._cached = self._counter(
            "cached_prompt_tokens", "Prompt tokens found in the prefix cache.", model
        )
        self._generated = self._counter("generated_tokens", "Generated tokens.", model)
        self._first_token = self._histogram(
            "time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
            model,
        )
        self._per_token = self._histogram(
            "time_per_token_seconds",
            "Mean time between two tokens of a request.",
            model,
            _TOKEN_SECONDS,
        )

    def request_started(self) -> None:
        """Count a request that has arrived."""
        self._in_progress.inc()

    def request_ended(self, scope: Scope, status: int) -> None:
        """Record a request whose response is complete."""
        self._in_progress.dec()
        context = context_of(scope)
        # The route, not the path: unknown paths must not create new series.
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(route).observe(context.seconds)
        if not context.model:
            return
        self._prompt.labels(context.model).inc(context.prompt_tokens)
        self._cached.labels(context.model).inc(context.cached_tokens)
        self._generated.labels(context.model).inc(context.generated_tokens)
        if context.first_token_time is not None and context.last_token_time is not None:
            self._first_token.labels(context.model).observe(
                context.first_token_time - context.arrival_time
            )
            if context.generated_tokens > 1:
                seconds = context.last_token_time - context.first_token_time
                self._per_token.labels(context.model).observe(
                    seconds / (context.generated_tokens - 1)
                )

    async def page(self, request: Request) -> Response:
        """Serve GET /metrics."""
        return Response(generate_latest(self._collectors), media_type=CONTENT_TYPE_LATEST)

    def _counter(self, name: str, text: str, labels: Iterable[str]) -> Counter:
        return Counter(f"pellucid_{name}", text, labels, registry=self._collectors)

    def _histogram(
        self,
        name: str,
        text: str,
        labels: Iterable[str],
        buckets: Iterable[float] = _SECONDS,
    ) -> Histogram:
        return Histogram(
            f"pellucid_{name}", text, labels, registry=self._collectors, buckets=tuple(buckets)
        )


_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"})


class _EngineCollector(Collector):
    """Queue, batch and cache statistics of the engines of loaded models."""

    def __init__(self, registry: Registry):
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """Return one metric family per statistic, with a sample per loaded model."""

        def gauge(name: str, text: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"pellucid_engine_{name}", text, labels=["model"])

        def counter(name: str, text: str) -> CounterMetricFamily:
            return CounterMetricFamily(f"pellucid_engine_{name}", text, labels=["model"])

        families = {
            "waiting": gauge("waiting_requests", "Requests in the queue."),
            "running": gauge("running_requests", "Requests that are prefilled or decoded."),
            "slots": gauge("slots", "Maximum number of requests that run at the same time."),
            "blocks": gauge("cache_blocks", "Blocks of the KV cache."),
            "blocks_held": gauge("cache_blocks_held", "Blocks in use by running requests."),
            "blocks_cached": gauge(
                "cache_blocks_remembering", "Unused blocks cached for prompts with the same prefix."
            ),
            "prefill_chunks": counter("prefill_chunks", "Prompt chunks prefilled."),
            "decode_steps": counter("decode_steps", "Decode steps."),
            "decoded_rows": counter(
                "decoded_rows", "Sequences in the batch, summed over all decode steps."
            ),
            "preemptions": counter("restarts", "Preempted sequences, which are recomputed."),
        }
        for model in self._registry.loaded():
            if not isinstance(model, DecoderModel):
                continue  # an encoder has no engine
            stats = model.engine.stats()
            for name, family in families.items():
                family.add_metric([model.id], getattr(stats, name))
        return families.values()


class _BatchCollector(Collector):
    """The batches of the data folder."""

    def __init__(self, batches: Batches):
        self._batches = batches

    def collect(self) -> Iterable[Metric]:
        """Return the number of batches, and of their requests, by status."""
        statuses, requests = self._batches.counts()
        batches = GaugeMetricFamily("pellucid_batches", "Batches.", labels=["status"])
        for status in (*UNFINISHED, *FINISHED):
            batches.add_metric([status], statuses[status])
        text = "Requests of batches: all, and those that were answered or failed."
        lines = GaugeMetricFamily("pellucid_batch_requests", text, labels=["status"])
        for status in ("total", "completed", "failed"):
            lines.add_metric([status], requests[status])
        return batches, lines
