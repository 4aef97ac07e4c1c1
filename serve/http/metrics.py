"""What the service counts, for Prometheus; a registry to a service, so that two in one process don't mix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from mvmr import __version__

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters, gauges and histograms; the names are a promise to dashboards, `docs/serving.md` lists them."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "mvmr_http_requests_total", "Answered requests.", ["endpoint", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "mvmr_request_seconds", "From a request's head to the end of its answer.", ["endpoint"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.images = Counter("mvmr_images_total", "Images, by what became of them.", ["outcome"], registry=registry)
        self.errors = Counter("mvmr_errors_total", "Problems, by their cause.", ["cause"], registry=registry)
        self.connections = Gauge("mvmr_connections", "Open connections.", registry=registry)
        self.queue = Gauge("mvmr_queue_images", "Images accepted and not yet answered.", registry=registry)
        self.batch = Histogram(
            "mvmr_batch_images", "Images to a batch of the engine.", buckets=_IMAGES, registry=registry
        )
        self.stage_seconds = Histogram(
            "mvmr_stage_seconds", "Time of an image in decode and wait, of a batch in infer.", ["stage"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.ready = Gauge("mvmr_ready", "1 while the canary's embedding is right.", registry=registry)
        self.build = Gauge(
            "mvmr_build_info", "What is served.", ["version", "precision", "provider", "space_id"], registry=registry
        )
        for outcome in ("embedded", "rejected", "dropped"):
            self.images.labels(outcome)
        for stage in ("decode", "wait", "infer"):
            self.stage_seconds.labels(stage)

    def describe(self, *, precision: str, provider: str, space_id: str) -> None:
        """Say what is served."""
        self.build.labels(__version__, precision, provider, space_id).set(1)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
