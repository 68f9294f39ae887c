"""Bound on the work of a simulation, estimated before any of it is done; ``drive`` counts while it is.

The estimate is a lower bound, so that it refuses nothing that would have been done within the bound. What no estimate sees, a
system that never comes to rest for instance, ends by the count.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from lambdascale.core import ClusterSpec, ModelSpec, TracedRequest, UserError
from lambdascale.core.timing import ComputeModel

if TYPE_CHECKING:
    from lambdascale.control import SystemConfig
    from lambdascale.experiments.build import Experiment

MAX_EVENTS = 20_000_000
# A request arrives, is dispatched, gets a first token, and ends; measured, Azure's trace: 4.8.
EVENTS_PER_REQUEST = 4
# The record of a model in the control plane takes as much memory as so many events.
_EVENTS_PER_MODEL = 100
# 30 years: up to here, a time in seconds is exact to a tenth of a microsecond.
_LAST_S = 1e9


def check_size(cluster: ClusterSpec, model: ModelSpec, system: SystemConfig, model_count: int, most: int) -> None:
    """Raise UserError if the cluster and its models alone, before any request, are more work than ``most`` events."""
    _compare(
        {
            f"cluster.nodes={cluster.nodes} with model_count={model_count}": cluster.nodes * model_count,
            f"model_count={model_count}": model_count * _EVENTS_PER_MODEL,
            f"model.layers={model.layers}": model.layers,
            f"system.blocks={system.blocks} for cluster.nodes={cluster.nodes}": system.blocks * cluster.nodes,
            f"model.gpus_per_replica={model.gpus_per_replica}": model.gpus_per_replica,
        },
        most,
    )


def check_requests(experiment: Experiment, requests: Sequence[TracedRequest], most: int) -> None:
    """Raise UserError if the requests are more work than ``most`` events."""
    if not requests:
        return
    if requests[-1].arrival_s > _LAST_S:
        raise UserError(f"requests arrive up to {requests[-1].arrival_s:g} s: a simulation has at most {_LAST_S:g} s")
    system = experiment.system
    chunk = system.batching.max_tokens
    prompts = sum(-(-each.request.prompt_tokens // chunk) for each in requests)
    interval_s = system.autoscaler.interval_s
    opened_s = _span_s(experiment, requests)
    if opened_s / interval_s > most:  # a bound that spares most runs the sum over all requests
        opened_s = open_s(experiment, requests)
    _compare(
        {
            f"{len(requests)} requests": len(requests) * EVENTS_PER_REQUEST,
            f"prompts in chunks of system.batching.max_tokens={system.batching.max_tokens}": prompts,
            f"decisions every system.autoscaler.interval_s={interval_s:g}": opened_s / interval_s,
        },
        most,
    )


def _span_s(experiment: Experiment, requests: Sequence[TracedRequest]) -> float:
    """Seconds from the first arrival until the last request has decoded alone: ``open_s`` is never more."""
    first, last = requests[0].request, requests[-1]
    tokens = min(last.output_tokens, last.request.max_tokens)
    return last.request.arrival_s - first.arrival_s + tokens * _token_s(experiment, last.request.model)


def _token_s(experiment: Experiment, name: str) -> float:
    """Seconds of a decode step of a request that is alone, on the fastest node."""
    model = next(model for model in experiment.models if model.name == name)
    return min(ComputeModel(kind, model).decode_run_s(1, 0, 1) for kind in experiment.cluster.kinds)


def open_s(experiment: Experiment, requests: Sequence[TracedRequest]) -> float:
    """Seconds during which a request is open, at least: each for as long as it decodes alone, or until the next arrives."""
    token_s = {model.name: _token_s(experiment, model.name) for model in experiment.models}
    asked = [each.request for each in requests]
    answers = np.minimum([each.output_tokens for each in requests], [request.max_tokens for request in asked])
    alone_s = answers * np.array([token_s[request.model] for request in asked])
    gaps_s = np.diff(np.array([request.arrival_s for request in asked]), append=inf)
    return float(np.minimum(alone_s, gaps_s).sum())


def _compare(events: dict[str, float], most: int) -> None:
    reason, count = max(events.items(), key=lambda item: item[1])
    if count > most:
        raise UserError(
            f"{reason}: at least {count:.2g} events, more than max_events={most}: make it smaller, or raise max_events"
        )
