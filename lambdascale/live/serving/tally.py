"""Counts of refusals, failures and waiting requests of a server, for its metrics. All of it belongs to the event loop."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from lambdascale.live.serving.admission import Admission
from lambdascale.live.serving.reasons import UNANSWERED, Reason, Unanswered


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
        for reason in UNANSWERED:
            self._failures.labels(reason)  # from now on it is shown, with 0

    def refused(self, status: int, reason: Reason) -> None:
        """Count a refusal."""
        self._refusals.labels(str(status), reason).inc()

    def failed(self, reason: Unanswered, prompts: int = 1) -> None:
        """Count prompts that were accepted and not answered."""
        self._failures.labels(reason).inc(prompts)
