"""Counts of what a server refuses, what fails and what waits, for its metrics. All of it belongs to the event loop."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from lambdascale.live.serving.admission import Admission

# Parts of the cluster's reasons for failures, and their names in the metrics: the reasons themselves have numbers.
_FAILURES = (
    ("the server is stopping", "stopping"),
    ("the server has failed", "server_failed"),
    ("the run was ended", "stopping"),
    ("no node is left", "no_node"),
    ("needs up to", "too_large"),
    ("fails on every node", "no_node"),
    ("its instance failed", "instance_failed"),
    ("cannot be sent to a node", "unsendable"),
)


class Tally:
    """Counters of refusals and failures, and gauges of the queue."""

    def __init__(self, registry: CollectorRegistry, admission: Admission) -> None:
        waiting = Gauge("lambdascale_requests_waiting", "prompts in the server's queue", registry=registry)
        waiting.set_function(lambda: admission.waiting)
        tokens = Gauge("lambdascale_tokens_waiting", "tokens of these, with their answers'", registry=registry)
        tokens.set_function(lambda: admission.waiting_tokens)
        self._refusals = Counter(
            "lambdascale_refusals",
            "HTTP requests and connections answered with an error; status 0: without an answer",
            ["status", "reason"],
            registry=registry,
        )
        self._failures = Counter(
            "lambdascale_failures", "accepted prompts that had no whole answer", ["reason"], registry=registry
        )

    def refused(self, status: int, reason: str) -> None:
        """Count a refusal."""
        self._refusals.labels(str(status), reason).inc()

    def failed(self, reason: str, prompts: int = 1) -> None:
        """Count prompts that were accepted and not answered."""
        self._failures.labels(reason).inc(prompts)


def failure_of(message: str) -> str:
    """Return the metrics' name for the cluster's reason why a request has failed."""
    return next((name for part, name in _FAILURES if part in message), "other")
