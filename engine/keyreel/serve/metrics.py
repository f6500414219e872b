"""The service's metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BATCHES, _SECONDS = (1, 2, 4, 8, 16, 32, 64), (0.1, 1, 10, 60, 600, 3600)


class Metrics:
    """The metrics of one service, in their own registry, so that two services in a process do not mix."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter("keyreel_requests", "Requests answered", ("method", "route", "status"), registry=own)
        self.request_seconds = Histogram(
            "keyreel_request_seconds", "Time from request to answer", ("route",), registry=own
        )
        self.at_work = Gauge("keyreel_requests_at_work", "Requests that are being answered", registry=own)
        self.batch_queries = Histogram(
            "keyreel_batch_queries", "Text queries that shared a pass", buckets=_BATCHES, registry=own
        )
        self.jobs_ended = Counter("keyreel_jobs_ended", "Jobs that ended", ("state",), registry=own)
        self.job_seconds = Histogram("keyreel_job_seconds", "Time at work on a job", buckets=_SECONDS, registry=own)
        self.upload_bytes = Counter("keyreel_upload_bytes", "Bytes of uploads written", registry=own)
        self._stored = Gauge("keyreel_uploads_stored_bytes", "Bytes that the uploads take", registry=own)
        self._jobs = Gauge("keyreel_jobs", "Jobs that are not over", ("state",), registry=own)

    def watch(self, counts: Callable[[], Mapping[str, int]], stored: Callable[[], int]) -> None:
        """Sets the sources of the numbers of jobs and the size of the uploads, which are read with the metrics."""
        self._stored.set_function(stored)
        self._jobs.labels("queued").set_function(lambda: counts()["queued"])
        self._jobs.labels("running").set_function(lambda: counts()["running"])

    def text(self) -> bytes:
        return generate_latest(self._registry)
