"""GET /metrics: what a server did and how it stands, in Prometheus' words.

Counters and histograms are filled in when an answer is through, from its `Call`; how the engines
stand is read when somebody asks. Everything hangs on a registry of its own, so that two servers in
one process do not count for each other.
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
from serve.models.decoder import DecoderModel
from serve.models.registry import Registry

disable_created_metrics()  # a second series beside each, which nobody asks for

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The numbers of one server.

    Args:
        registry: its models, whose engines are asked.
    """

    def __init__(self, registry: Registry):
        self._collectors = CollectorRegistry()
        ProcessCollector(registry=self._collectors)
        self._collectors.register(_EngineCollector(registry))
        route = ("method", "route", "status")
        self._requests = self._counter("requests", "Requests answered.", route)
        self._request_seconds = self._histogram(
            "request_seconds", "From a request's arrival to the end of its answer.", ("route",)
        )
        self._in_progress = Gauge(
            "pellucid_requests_in_progress", "Requests being answered.", registry=self._collectors
        )
        model = ("model",)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.", model)
        self._cached = self._counter(
            "cached_prompt_tokens", "Tokens of prompts that had been read before.", model
        )
        self._generated = self._counter("generated_tokens", "Tokens drawn.", model)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", model
        )
        self._per_token = self._histogram(
            "time_per_token_seconds",
            "Between two tokens of a request, on its average.",
            model,
            _TOKEN_SECONDS,
        )

    def request_started(self) -> None:
        """A request has come."""
        self._in_progress.inc()

    def request_ended(self, scope: Scope, status: int) -> None:
        """Its answer is through."""
        self._in_progress.dec()
        call = context_of(scope)
        # The route, not the path: made-up paths must not become made-up series.
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(route).observe(call.seconds)
        if not call.model:
            return
        self._prompt.labels(call.model).inc(call.prompt_tokens)
        self._cached.labels(call.model).inc(call.cached_tokens)
        self._generated.labels(call.model).inc(call.generated_tokens)
        if call.first_token_time is not None and call.last_token_time is not None:
            self._first_token.labels(call.model).observe(call.first_token_time - call.arrival_time)
            if call.generated_tokens > 1:
                seconds = call.last_token_time - call.first_token_time
                self._per_token.labels(call.model).observe(seconds / (call.generated_tokens - 1))

    async def page(self, request: Request) -> Response:
        """The answer to GET /metrics."""
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
    """Queues, rows and caches, read from the engines of the models that are loaded."""

    def __init__(self, registry: Registry):
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        def gauge(name: str, text: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"pellucid_engine_{name}", text, labels=["model"])

        def counter(name: str, text: str) -> CounterMetricFamily:
            return CounterMetricFamily(f"pellucid_engine_{name}", text, labels=["model"])

        families = {
            "waiting": gauge("waiting_requests", "Requests in the queue."),
            "running": gauge("running_requests", "Requests that are being computed."),
            "slots": gauge("slots", "Requests that can be computed at a time."),
            "blocks": gauge("cache_blocks", "Blocks of the cache."),
            "blocks_held": gauge("cache_blocks_held", "Blocks that running requests hold."),
            "blocks_cached": gauge(
                "cache_blocks_remembering", "Blocks kept for prompts that begin alike."
            ),
            "prefill_chunks": counter("prefill_chunks", "Pieces of prompts that were read."),
            "decode_steps": counter("decode_steps", "Steps of decoding."),
            "decoded_rows": counter("decoded_rows", "Rows in all those steps together."),
            "preemptions": counter("restarts", "Rows that gave their cache back and started over."),
        }
        for model in self._registry.loaded():
            if not isinstance(model, DecoderModel):
                continue  # an encoder has no engine
            stats = model.engine.stats()
            for name, family in families.items():
                family.add_metric([model.id], getattr(stats, name))
        return families.values()
