"""What the server has done, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from wan.serve.jobs.job import JobError, Status
from wan.serve.jobs.queue import Queue
from wan.serve.jobs.store import JobStore
from wan.serve.workers.messages import Made

# From a small model's to those of the largest one's longest video.
SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1200, 3600)
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1)


class Metrics:
    """Counted since the server began; what waits and runs is asked of the store each time."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # The times at which counters began, for each a line that nobody asks for.
        disable_created_metrics()
        more = {"registry": self.registry}
        self.requests = Counter("wan_http_requests", "Requests, by route and status", ["route", "status"], **more)
        self.ended = Counter("wan_videos", "Videos that were made or failed since the start", ["status"], **more)
        self.seconds = Histogram("wan_stage_seconds", "Seconds of a stage", ["stage"], buckets=SECONDS, **more)
        self.kept = Histogram("wan_kept_share", "Share of attention blocks kept", buckets=SHARES, **more)
        self.memory = Gauge("wan_gpu_peak_bytes", "GPU memory that the last video took at its peak", **more)

    def see(self, made: Made) -> None:
        """Count a video that was made."""
        self.ended.labels(Status.COMPLETED).inc()
        for stage, seconds in made.seconds.items():
            self.seconds.labels(stage).observe(seconds)
        if made.kept is not None:
            self.kept.observe(made.kept)
        if made.peak_bytes is not None:
            self.memory.set(made.peak_bytes)

    def watch(self, store: JobStore) -> None:
        """Tell of a store's jobs by status too."""
        self.registry.register(_Jobs(store))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Jobs(Collector):
    def __init__(self, store: JobStore):
        self.store = store

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "wan_jobs", "Jobs that are kept, by status; queued ones are the queue", None, ["status"]
        )
        for status, count in self.store.count().items():
            family.add_metric([status], count)
        yield family

    def describe(self) -> list[GaugeMetricFamily]:
        # Else it would be collected to know its name, before there is anything to ask.
        return []


class Counted:
    """An ASGI application that counts the answers of another."""

    def __init__(self, app: Callable, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def counting(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                # By route, since paths have ids in them.
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counting)


@dataclass(frozen=True, kw_only=True)
class MeasuredQueue(Queue):
    """A queue that counts what comes out of it."""

    metrics: Metrics

    def finish(self, job_id: str, made: Made) -> bool:
        # Not of one that was deleted meanwhile, nor one whose files could not be kept.
        if is_there := super().finish(job_id, made):
            self.metrics.see(made)
        return is_there

    def fail(self, job_id: str, error: JobError) -> bool:
        if is_there := super().fail(job_id, error):
            self.metrics.ended.labels(Status.FAILED).inc()
        return is_there
