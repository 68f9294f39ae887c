"""The number of replicas settles under constant load, for every system."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.control import Autoscaler, build_system, drive
from lambdascale.core import traced
from lambdascale.core.commands import AllocateNode, ReleaseNode
from lambdascale.metrics import Recorder
from lambdascale.sim import SimConfig
from lambdascale.testing.invariants import InvariantChecker
from lambdascale.testing.systems import small_cluster, small_model
from tests.policy.world import configured

SYSTEMS = ("lambdascale", "faasnet", "serverlessllm", "ideal")
LAST_S, SETTLED_S = 60.0, 30.0


@settings(max_examples=40, deadline=None)
@given(
    system=st.sampled_from(SYSTEMS),
    rate_rps=st.floats(1.0, 20.0),
    tokens=st.integers(1, 60),
    keep_alive_s=st.sampled_from([1.0, 2.0]),
    target=st.sampled_from([2, 4]),
)
def test_constant_load_does_not_flap(system: str, rate_rps: float, tokens: int, keep_alive_s: float, target: int) -> None:
    """Evenly spaced requests of one size for a minute: in its second half no node is started, and at most one is released.

    The keep-alive spans the gap between two requests, so that their coming and going is not a change of load.
    """
    config = configured(system, copies=0, target=target)
    config = replace(config, autoscaler=replace(cast(Autoscaler, config.autoscaler), keep_alive_s=keep_alive_s))
    requests = [traced(i, i / rate_rps, "small", 20, tokens) for i in range(int(LAST_S * rate_rps))]
    cluster, models = small_cluster(6), [small_model()]
    backend = SimConfig().build(cluster=cluster, models=models, requests=requests, batching=config.batching, seed=0)
    checker, recorder = InvariantChecker(cluster, config.blocks, desired=config.autoscaler.desired), Recorder()
    drive(build_system(config, cluster=cluster, models=models), backend, [checker, recorder])
    checker.finish()
    late = [entry for at, entry in recorder.entries if SETTLED_S < at < LAST_S - 2.0]
    started, released = (sum(isinstance(entry, kind) for entry in late) for kind in (AllocateNode, ReleaseNode))
    assert started == 0
    assert released <= 1
