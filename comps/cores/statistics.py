"""Numbers about requests: Prometheus metrics, and the latencies that OPEA's ``/v1/statistics`` answers."""

from __future__ import annotations

import statistics
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

_KEPT = 10_000  # latest latencies; enough for a steady 99th percentile, and bounded


def summary(latencies: list[float], name: str) -> dict[str, float | None]:
    """Median, 99th percentile and mean in seconds, under OPEA's names."""
    p50 = p99 = mean = None
    if latencies:
        mean = statistics.fmean(latencies)
        p50 = statistics.median(latencies)
        p99 = statistics.quantiles(latencies, n=100, method="inclusive")[98] if len(latencies) > 1 else p50
    return {f"p50_{name}": p50, f"p99_{name}": p99, f"average_{name}": mean}


class RequestStatistics:
    """What has been asked of one application. The metrics have the names that OPEA components use."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._latencies: deque[float] = deque(maxlen=_KEPT)
        self._requests = Counter(
            "http_requests_total",
            "Requests by method, status class and route.",
            ("handler", "method", "status"),
            registry=self.registry,
        )
        self._durations = Histogram(
            "http_request_duration_seconds",
            "Seconds until a response began.",
            ("handler", "method"),
            buckets=(0.005, 0.02, 0.1, 0.5, 1, 5, 30, 120, 600, 2000),
            registry=self.registry,
        )

    def record(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answered request. ``route`` is a path template, so that ids make no new series."""
        self._requests.labels(route, method, f"{status // 100}xx").inc()
        self._durations.labels(route, method).observe(seconds)
        if route.startswith("/v1/") and route not in ("/v1/health_check", "/v1/statistics"):
            self._latencies.append(seconds)

    def as_opea(self) -> dict[str, dict[str, float | None]]:
        """The body of ``/v1/statistics``; first-token latencies are there for its readers, without values."""
        numbers = summary(list(self._latencies), "latency") | summary([], "latency_first_token")
        return {self.service: numbers}
