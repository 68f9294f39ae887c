"""The cluster's state as Prometheus metrics."""

from __future__ import annotations

import itertools
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from lambdascale.live.serving.state import TTFT_BUCKETS_S, ClusterState


class Collector:
    """The cluster's state as Prometheus metrics."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state

    def collect(self) -> list[Metric]:
        """Return all metrics of one moment."""
        readings = self._state.readings()
        snapshot, counts = readings.snapshot, readings.counts
        requests = snapshot["requests"]
        values: list[tuple[type[Any], str, str, float]] = [
            (CounterMetricFamily, "requests_arrived", "requests received", counts.arrived),
            (CounterMetricFamily, "requests_finished", "requests answered", counts.finished),
            (CounterMetricFamily, "requests_failed", "requests given up", counts.failed),
            (CounterMetricFamily, "request_restarts", "dispatches after a request's first", counts.restarts),
            (CounterMetricFamily, "output_tokens", "tokens of finished answers", counts.tokens),
            (CounterMetricFamily, "first_tokens_from_pipelines", "first tokens that a pipeline produced", counts.from_pipelines),
            (CounterMetricFamily, "scale_outs", "replicas begun after the start", counts.scale_outs),
            (CounterMetricFamily, "nodes_lost", "nodes that died", counts.nodes_lost),
            (CounterMetricFamily, "node_restarts", "lost nodes that came back", counts.nodes_restarted),
            (CounterMetricFamily, "gpu_seconds", "GPU-seconds allocated", snapshot["gpu_seconds"]),
            (GaugeMetricFamily, "requests_queued", "requests in the cluster that wait for an instance", requests["queued"]),
            (GaugeMetricFamily, "requests_running", "requests on an instance", requests["running"]),
            (GaugeMetricFamily, "nodes", "nodes alive", sum(node["alive"] for node in snapshot["nodes"])),
            (GaugeMetricFamily, "replicas", "replicas in service", len(snapshot["replicas"])),
            (GaugeMetricFamily, "pipelines", "pipelines in service", len(snapshot["pipelines"])),
            (GaugeMetricFamily, "transfers", "multicasts and loads under way", len(snapshot["transfers"])),
        ]
        families: list[Metric] = [kind(f"lambdascale_{name}", text, value=value) for kind, name, text, value in values]
        totals = list(itertools.accumulate(readings.ttft_counts))
        buckets = [(str(bound), float(total)) for bound, total in zip((*TTFT_BUCKETS_S, "+Inf"), totals, strict=True)]
        return [
            *families,
            HistogramMetricFamily("lambdascale_ttft_seconds", "time to the first token", buckets, readings.ttft_sum),
        ]
