"""Simulated multicast times against the reference's measured ones: a check of the transfer model, not an experiment."""

from __future__ import annotations

from statistics import median
from typing import Any

import pandas as pd

from lambdascale.control.start import MulticastStart
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.sim import TransferOptions
from lambdascale.sim.measure import multicast_times

# Cluster on which each model is measured, as in the paper (reference, section 3).
PLACES = {"llama2_7b": "testbed1", "llama2_13b": "testbed1", "llama2_70b": "testbed2"}
_SEEDS = range(25)
_NO_SETUP = "nccl_no_setup"

# Reference, section 4: (model, nodes with the source) -> seconds. The prototype's NCCL figures include the set-up.
REFERENCE_S: dict[str, dict[tuple[str, int], float]] = {
    "lambdascale": {("llama2_7b", 4): 0.45, ("llama2_13b", 4): 0.7748, ("llama2_70b", 2): 7.44, ("llama2_70b", 4): 9.2734},
    "faasnet_prototype": {
        ("llama2_7b", 4): 0.68,
        ("llama2_13b", 4): 1.3348,
        ("llama2_70b", 2): 7.53,
        ("llama2_70b", 4): 16.2504,
    },
    "nccl_broadcast": {
        ("llama2_7b", 2): 0.4534,
        ("llama2_7b", 3): 0.6542,
        ("llama2_7b", 4): 0.9286,
        ("llama2_13b", 2): 0.9024,
        ("llama2_13b", 3): 0.9706,
        ("llama2_13b", 4): 0.9706,
        ("llama2_70b", 2): 9.432,
        ("llama2_70b", 4): 12.9054,
    },
    _NO_SETUP: {("llama2_13b", 2): 0.5346, ("llama2_13b", 4): 0.5292},
}


def reference_table() -> pd.DataFrame:
    """Simulated times beside the reference's, with the error in per cent: with the prototype's barrier, and eager.

    Blocks have equal sizes, as in the prototype. The streaming broadcast has no rounds, so the barrier does not change it.
    """
    rows = []
    for system, measured in REFERENCE_S.items():
        for (model, nodes), reference_s in measured.items():
            row: dict[str, Any] = {"system": system, "model": model, "nodes": nodes, "reference_s": reference_s}
            for column, barrier in (("barrier", True), ("eager", False)):
                total_s = _seconds(system, model, nodes, barrier=barrier)
                row |= {f"ours_{column}_s": total_s, f"error_{column}_percent": 100 * (total_s / reference_s - 1)}
            rows.append(row | {"backend": "sim"})
    return pd.DataFrame(rows)


def _seconds(system: str, model: str, nodes: int, *, barrier: bool) -> float:
    """Time in seconds to all nodes from one source; the median over seeds if a set-up time is drawn."""
    choice = "nccl_broadcast" if system == _NO_SETUP else system
    experiment = build(compose([f"system={choice}", f"model={model}", f"cluster={PLACES[model]}"]))
    config, cluster = experiment.system, experiment.cluster
    assert isinstance(config.start, MulticastStart), f"{choice} multicasts"
    plan = config.start.planner.plan(sources=1, destinations=nodes - 1, blocks=config.blocks)
    sizes = [experiment.models[0].size_bytes // config.blocks] * config.blocks
    options = TransferOptions(barrier=barrier, communicator_setup=system != _NO_SETUP)
    seeds = _SEEDS if config.start.multicast == "collective" and options.communicator_setup else range(1)
    return median(multicast_times(plan, sizes, cluster, options, multicast=config.start.multicast, seed=s).total_s for s in seeds)
