"""A simulated engine that is slower or faster than the control plane reckons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lambdascale.core import ComputeTable, NodeSpec
from lambdascale.core.timing import ComputeModel, Iteration
from lambdascale.experiments.compose import compose
from lambdascale.experiments.runner import run
from lambdascale.testing.systems import small_cluster, small_model

TABLE = ComputeTable(
    model="small",
    prefill_tokens=(1.0, 100.0),
    prefill_s=(0.1, 0.3),
    decode_batch=(1.0, 8.0),
    decode_s=(0.02, 0.05),
    decode_s_per_context_token=1e-6,
)
ROOFLINE = replace(small_cluster().compute, iteration_overhead_s=0.001)
MIXED = Iteration(prefill_tokens=50, attended_tokens=1275, decodes=3, context_tokens=900)
BURST = ["workload=burst", "workload.count=20", "cluster.nodes=4", "model=llama2_7b"]
# Twice and half the speed of the cluster's engine, and what makes up for it.
TWICE = ["cluster.compute.bandwidth_efficiency=0.59", "cluster.compute.flops_efficiency=1.0", "backend.unforeseen_slowdown=2"]
HALF = ["cluster.compute.bandwidth_efficiency=0.1475", "cluster.compute.flops_efficiency=0.25", "backend.unforeseen_slowdown=0.5"]


@pytest.mark.parametrize("compute", [ROOFLINE, replace(ROOFLINE, measured=(TABLE,))])
def test_every_iteration_takes_so_many_times_as_long(compute: Any) -> None:
    """Mutations: a part of the time without the factor, in a roofline or a table."""
    node: NodeSpec = replace(small_cluster().node(0), compute=compute)
    plain, slow = ComputeModel(node, small_model()), ComputeModel(node, small_model(), 3.0)
    for iteration in (MIXED, Iteration(decodes=2, context_tokens=500), Iteration(prefill_tokens=7)):
        assert slow.iteration_s(iteration, 0.5) == pytest.approx(3 * plain.iteration_s(iteration, 0.5))
    assert slow.decode_run_s(4, 1000, 9) == pytest.approx(3 * plain.decode_run_s(4, 1000, 9))
    assert slow.kv_token_s == pytest.approx(3 * plain.kv_token_s)


def ttft_s(out: Path, system: str, *more: str) -> dict[str, float]:
    """Percentiles of a burst."""
    found: dict[str, float] = run(compose([f"system={system}", *BURST, *more, f"out={out}"])).summary["ttft_s"]
    return found


@pytest.mark.parametrize("wrong", [TWICE, HALF])
def test_the_engine_is_the_same_whatever_it_is_reckoned_to_be(wrong: list[str], tmp_path: Path) -> None:
    """FaaSNet predicts nothing."""
    plain, found = ttft_s(tmp_path / "plain", "faasnet"), ttft_s(tmp_path / "wrong", "faasnet", *wrong)
    assert found == pytest.approx(plain)


def test_the_control_plane_reckons_with_the_clusters_engine(tmp_path: Path) -> None:
    """λScale chooses pipelines and sources by predictions: by other ones, others."""
    plain = ttft_s(tmp_path / "plain", "lambdascale")
    assert ttft_s(tmp_path / "wrong", "lambdascale", *TWICE) != pytest.approx(plain)
