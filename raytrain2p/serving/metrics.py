"""What a server counts, for Prometheus. https://prometheus.io/docs/instrumenting/exposition_formats/"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from raytrain2p.serving.model import Answer

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("raytrain2p_requests", "Answered requests", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "raytrain2p_request_seconds",
            "From the head of a request to the end of its answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.queue = Gauge("raytrain2p_queue", "Completions that are read, wait or are answered", registry=self.registry)
        self.batch = Histogram("raytrain2p_batch_size", "Answers written together, by answer", buckets=SIZES, registry=self.registry)
        self.tokens = Counter("raytrain2p_tokens", "Tokens", ["kind"], registry=self.registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def answer(self, answer: Answer) -> None:
        self.batch.observe(answer.batch)
        self.tokens.labels("prompt").inc(answer.prompt_tokens)
        self.tokens.labels("completion").inc(answer.completion_tokens)

    def page(self) -> bytes:
        return generate_latest(self.registry)
