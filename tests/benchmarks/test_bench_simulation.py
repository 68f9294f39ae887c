"""Time of simulating: the Azure conversation trace on 8 replicas of 7B, and one large multicast."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from lambdascale.core import traced
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose, conf_dir
from lambdascale.experiments.runner import drive_experiment
from lambdascale.metrics import Recorder, requests_table
from lambdascale.sim import TransferOptions
from lambdascale.sim.measure import multicast_times

TRACE = conf_dir().parents[1] / "shared" / "traces" / "AzureLLMInferenceTrace_conv.csv"
SETTING = [
    "model=llama2_7b",
    "autoscaler@system.autoscaler=fixed",
    "system.autoscaler.min_replicas=8",
    "system.batching.max_batch=64",
]


@pytest.mark.skipif(not TRACE.is_file(), reason=f"needs the Azure conversation trace at {TRACE}")
@pytest.mark.parametrize("times", [1, 4])
def test_simulate_the_azure_conversation_trace(benchmark: BenchmarkFixture, times: int) -> None:
    """The control plane, the cluster and the table of per-request rows; the trace end to end ``times`` over."""
    experiment = build(compose([*SETTING, "workload=azure", f"workload.path={TRACE}"]))
    trace = experiment.workload.load(models=["llama2_7b"], seed=1).requests
    period = trace[-1].arrival_s + 1.0
    requests = [
        traced(copy * len(trace) + r.request_id, copy * period + r.arrival_s, r.model, r.prompt_tokens, r.output_tokens)
        for copy in range(times)
        for r in trace
    ]

    def run() -> int:
        recorder = Recorder()
        drive_experiment(experiment, requests, 1, recorder)
        return int(requests_table(recorder, "lambdascale").num_rows)

    assert benchmark.pedantic(run, rounds=5) == times * 19_366
    benchmark.extra_info["requests_per_s"] = len(requests) / benchmark.stats.stats.median


def test_simulate_a_multicast_to_1024_nodes(benchmark: BenchmarkFixture) -> None:
    experiment = build(compose(["cluster.nodes=1024"]))
    plan = experiment.system.start.planner.plan(sources=1, destinations=1023, blocks=64)
    sizes = [experiment.models[0].size_bytes // 64] * 64
    times = benchmark.pedantic(lambda: multicast_times(plan, sizes, experiment.cluster, TransferOptions()), rounds=2)
    assert len(times.complete_s) == 1023
