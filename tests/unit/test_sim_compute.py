"""Iteration times: the closed forms against sums of single iterations, tables against their own points."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lambdascale.control.batching import BatchedRequest, Iteration
from lambdascale.core import ComputeTable
from lambdascale.core.timing import ComputeModel, interpolate
from lambdascale.testing.systems import small_cluster, small_model

MODEL = ComputeModel(small_cluster().node(0), small_model())
TABLE = ComputeTable(
    model="small",
    prefill_tokens=(1.0, 512.0),
    prefill_s=(0.01, 0.1),
    decode_batch=(1.0, 8.0),
    decode_s=(0.02, 0.03),
    decode_s_per_context_token=1e-7,
)
MEASURED = ComputeModel(
    replace(small_cluster().node(0), compute=replace(small_cluster().compute, measured=(TABLE,))), small_model()
)


@given(batch=st.integers(1, 64), context=st.integers(1, 100_000), steps=st.integers(1, 200))
@pytest.mark.parametrize("compute", [MODEL, MEASURED], ids=["roofline", "measured"])
def test_a_run_of_decodes_is_the_sum_of_its_iterations(compute: ComputeModel, batch: int, context: int, steps: int) -> None:
    single = sum(compute.iteration_s(Iteration([], batch, context + step * batch, 1)) for step in range(steps))
    assert compute.decode_run_s(batch, context, steps) == pytest.approx(single, rel=1e-9)


@given(batch=st.integers(1, 64), context=st.integers(1, 100_000), elapsed=st.floats(1e-6, 100.0))
def test_steps_by_is_the_smallest_that_reaches(batch: int, context: int, elapsed: float) -> None:
    steps, run_s = MODEL.decode_steps_by(batch, context, elapsed)
    assert run_s == MODEL.decode_run_s(batch, context, steps) >= elapsed
    assert steps == 1 or MODEL.decode_run_s(batch, context, steps - 1) < elapsed


def test_stages_add_up_to_the_model() -> None:
    iteration = Iteration([(BatchedRequest(0, 100, 5), 100)], 3, 300, 1, prefill_tokens=100, attended_tokens=5050)
    whole = MODEL.iteration_s(iteration)
    assert sum(MODEL.iteration_s(iteration, share) for share in (0.25, 0.25, 0.5)) == pytest.approx(whole)


def test_weights_are_read_once_a_batch() -> None:
    one, eight = (MODEL.iteration_s(Iteration([], batch, 0, 1)) for batch in (1, 8))
    assert one == eight == pytest.approx(1e9 / 50e9), "memory-bound: 1 GB at half of 100 GB/s"


@given(x=st.floats(1.0, 512.0))
def test_tables_are_interpolated(x: float) -> None:
    assert 0.01 - 1e-12 <= interpolate(TABLE.prefill_tokens, TABLE.prefill_s, x) <= 0.1 + 1e-12
    assert interpolate((3.0,), (0.5,), x) == 0.5
