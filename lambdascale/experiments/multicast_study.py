"""Multicast on its own: figure 7, and our times against the reference's measured ones. Simulated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import pandas as pd

from lambdascale.core import ClusterSpec, ModelSpec
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.sim.measure import multicast_times
from lambdascale.sim.options import TransferOptions

# Which cluster a model is measured on, as in the paper (reference, section 3).
PLACES = {"llama2_7b": "testbed1", "llama2_13b": "testbed1", "llama2_70b": "testbed2"}
SYSTEMS = ("lambdascale", "faasnet", "faasnet_prototype", "nccl_broadcast", "nccl_no_setup")
_SEEDS = range(25)
_NO_SETUP = "nccl_no_setup"

# Reference, section 4: (model, nodes with the source) -> seconds. The prototype's NCCL figures contain the set-up.
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


class MulticastStudy:
    """Times of one model's multicast under any system, on the cluster the paper used for it."""

    def __init__(self, model: str) -> None:
        experiment = build(compose([f"model={model}", f"cluster={PLACES[model]}", "system=ideal"]))
        self.model: ModelSpec = experiment.models[0]
        self.cluster: ClusterSpec = experiment.cluster

    def seconds(self, system: str, nodes: int, *, barrier: bool = False, equal_blocks: bool = False) -> tuple[float, float]:
        """(time to all nodes, set-up of it), one source; medians over seeds where a set-up is drawn.

        ``equal_blocks`` cuts the model at byte boundaries, as the prototype does; otherwise blocks are whole layers.
        """
        choice = "nccl_broadcast" if system == _NO_SETUP else system
        config = build(compose([f"system={choice}", f"model={self.model.name}", f"cluster={self.cluster.name}"])).system
        plan = config.planner.plan(sources=1, destinations=nodes - 1, blocks=config.blocks)
        sizes = [block.size_bytes for block in self.model.partition(config.blocks)]
        if equal_blocks:
            sizes = [self.model.size_bytes // config.blocks] * config.blocks
        options = TransferOptions(barrier=barrier, communicator_setup=system != _NO_SETUP)
        cluster = replace(self.cluster, nodes=max(nodes, self.cluster.nodes))
        seeds = _SEEDS if config.transport == "collective" and options.communicator_setup else range(1)
        times = [multicast_times(plan, sizes, cluster, options, transport=config.transport, seed=seed) for seed in seeds]
        return median(t.total_s for t in times), median(t.setup_s for t in times)


def fig07_table(models: Iterable[str] = PLACES) -> pd.DataFrame:
    """Rows of figure 7: nodes 2 to the cluster's size, one source, blocks of whole layers, eager data plane."""
    return pd.DataFrame(row for model in models for row in _fig07_rows(MulticastStudy(model)))


def _fig07_rows(study: MulticastStudy) -> Iterator[dict[str, Any]]:
    for nodes in range(2, study.cluster.nodes + 1):
        for system in SYSTEMS:
            total_s, setup_s = study.seconds(system, nodes)
            row = {"model": study.model.name, "system": system, "nodes": nodes, "multicast_s": total_s, "setup_s": setup_s}
            yield row | {"backend": "sim"}


def reference_table() -> pd.DataFrame:
    """Our simulated times beside the reference's, with the error in per cent: under the prototype's barrier, and eager.

    Transfer blocks of equal bytes, as in the prototype. The streaming broadcast knows no rounds, so no barrier either.
    """
    studies = {model: MulticastStudy(model) for model in PLACES}
    rows = []
    for system, measured in REFERENCE_S.items():
        for (model, nodes), reference_s in measured.items():
            row: dict[str, Any] = {"system": system, "model": model, "nodes": nodes, "reference_s": reference_s}
            for column, barrier in (("barrier", True), ("eager", False)):
                total_s, _ = studies[model].seconds(system, nodes, barrier=barrier, equal_blocks=True)
                row |= {f"ours_{column}_s": total_s, f"error_{column}_percent": 100 * (total_s / reference_s - 1)}
            rows.append(row | {"backend": "sim"})
    return pd.DataFrame(rows)
