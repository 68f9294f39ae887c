"""Decisions of the control plane do not depend on the true lengths of answers until the first answer has ended."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.control import build_system, drive
from lambdascale.core import TracedRequest, traced
from lambdascale.core.commands import Command
from lambdascale.core.events import RequestFinished
from lambdascale.metrics import Recorder
from lambdascale.sim import SimConfig
from lambdascale.testing.systems import small_cluster, small_model, with_kv_tokens
from tests.policy.world import configured

LIMIT = 400


def decisions(system: str, requests: list[TracedRequest], kv_tokens: int) -> tuple[float, list[tuple[float, Command]]]:
    """Time at which the first answer ends, and all commands of the run with their times."""
    config, models = configured(system, copies=1, target=2), [small_model()]
    cluster = with_kv_tokens(small_cluster(6), kv_tokens)
    recorder = Recorder()
    backend = SimConfig().build(cluster=cluster, models=models, requests=requests, batching=config.batching, seed=0)
    drive(build_system(config, cluster=cluster, models=models), backend, [recorder])
    first_s = min(entry.at for _, entry in recorder.entries if isinstance(entry, RequestFinished))
    return first_s, [(at, entry) for at, entry in recorder.entries if isinstance(entry, Command)]


@pytest.mark.parametrize("system", ["lambdascale", "faasnet", "nccl_broadcast", "serverlessllm"])
@settings(max_examples=15, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(1, 60), st.integers(20, 300)), min_size=4, max_size=24),
    kv_tokens=st.sampled_from([800, 8000]),
    shuffler=st.randoms(use_true_random=False),
)
def test_no_decision_before_the_first_end_depends_on_them(
    system: str, arrivals: list[tuple[float, int, int]], kv_tokens: int, shuffler: random.Random
) -> None:
    """Requests state the same limit; with scarce KV memory and with plenty. Mutation: routing, or admission, by true lengths."""
    lengths = [output for *_, output in arrivals]
    shuffled = shuffler.sample(lengths, len(lengths))
    runs = [
        decisions(system, [traced(i, at_s, "small", prompt, output, LIMIT) for i, ((at_s, prompt, _), output) in each], kv_tokens)
        for each in (list(enumerate(zip(sorted(arrivals), outputs, strict=True))) for outputs in (lengths, shuffled))
    ]
    until_s = min(first_s for first_s, _ in runs)
    one, other = ([(at, command) for at, command in commands if at < until_s] for _, commands in runs)
    assert one == other
    assert one
