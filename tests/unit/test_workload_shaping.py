"""Shaping of workloads: windows, repetition, rescaling, clipping and choice of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lambdascale.core import UserError, traced
from lambdascale.workload import ArrivalsTrace, Burst, BurstyWorkload, ConstantRate, bounded


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "arrivals.txt"
    file.write_text("0\n1\n2\n6\n9\n")
    return str(file)


def times(workload: Any, seed: int = 0) -> list[float]:
    return [r.arrival_s for r in workload.requests(models=["m"], seed=seed)]


def test_window_is_half_open_and_counted_from_its_start(path: str) -> None:
    assert times(ArrivalsTrace(path=path, start_s=1, duration_s=5)) == [0, 1]
    assert times(ArrivalsTrace(path=path, start_s=0.5)) == [0.5, 1.5, 5.5, 8.5]
    assert times(ArrivalsTrace(path=path, duration_s=9)) == [0, 1, 2, 6]


def test_a_window_beyond_the_trace_is_an_empty_run(path: str) -> None:
    assert times(ArrivalsTrace(path=path, start_s=100, repeat=3, rate_scale=3)) == []
    assert times(ArrivalsTrace(path=path, duration_s=0)) == []


def test_repeat_shifts_by_the_length_of_the_trace(path: str) -> None:
    period = 9 * 5 / 4
    assert times(ArrivalsTrace(path=path, repeat=2)) == [0, 1, 2, 6, 9, *(period + t for t in (0, 1, 2, 6, 9))]


def test_repeat_of_a_window_keeps_its_silent_ends(path: str) -> None:
    assert times(ArrivalsTrace(path=path, start_s=5, duration_s=3, repeat=3)) == [1, 4, 7]


def test_repeat_of_a_generator_keeps_its_duration() -> None:
    workload = ConstantRate(rate_rps=1, duration_s=3, process="uniform", repeat=2)
    assert times(workload) == [0, 1, 2, 3, 4, 5]


def test_repeat_of_an_instant_is_refused() -> None:
    with pytest.raises(UserError, match="repeat=2"):
        times(Burst(repeat=2))


def test_time_compression_divides_gaps_after_the_window(path: str) -> None:
    assert times(ArrivalsTrace(path=path, time_compression=3, duration_s=7)) == pytest.approx([0, 1 / 3, 2 / 3, 2])


def test_limit_counts_the_result(path: str) -> None:
    assert len(times(ArrivalsTrace(path=path, repeat=3, limit=7))) == 7
    assert times(ArrivalsTrace(path=path, limit=0)) == []
    assert len(times(ArrivalsTrace(path=path, limit=99))) == 5


def test_thinning_keeps_originals_and_their_share() -> None:
    whole = set(times(ConstantRate(rate_rps=10, duration_s=1000)))
    kept = times(ConstantRate(rate_rps=10, duration_s=1000, rate_scale=0.3))
    assert set(kept) <= whole
    assert len(kept) == pytest.approx(0.3 * len(whole), rel=0.06)


def test_scaling_up_keeps_originals_and_bursts_together() -> None:
    base = np.array(times(BurstyWorkload()))
    scaled = np.array(times(BurstyWorkload(rate_scale=2.5)))
    assert set(base) <= set(scaled)
    assert len(scaled) == pytest.approx(2.5 * len(base), rel=0.08)
    busiest = [np.bincount((t / 10).astype(int)).max() for t in (base, scaled)]
    assert busiest[1] > 1.8 * busiest[0]


def test_copies_of_simultaneous_requests_stay_simultaneous() -> None:
    assert times(Burst(count=7, rate_scale=3)) == [0.0] * 21


def test_whole_rate_scales_are_exact(path: str) -> None:
    assert len(times(ArrivalsTrace(path=path, rate_scale=3))) == 15
    assert times(ArrivalsTrace(path=path, rate_scale=0)) == []


def test_a_copy_has_its_originals_lengths() -> None:
    workload = ConstantRate(lengths="azure", rate_scale=2, rate_rps=0.1)
    pairs = [(r.prompt_tokens, r.output_tokens) for r in workload.requests(models=["m"], seed=3)]
    assert all(pairs.count(pair) >= 2 for pair in pairs)


def test_clipping() -> None:
    def lengths(**settings: Any) -> set[tuple[int, int]]:
        workload = Burst(prompt_tokens=5000, output_tokens=600, **settings)
        return {(r.prompt_tokens, r.output_tokens) for r in workload.requests(models=["m"], seed=0)}

    assert lengths(max_prompt_tokens=100) == {(100, 600)}
    assert lengths(max_output_tokens=1) == {(5000, 1)}
    assert lengths(max_context_tokens=4096) == {(3496, 600)}
    assert lengths(max_context_tokens=512) == {(1, 511)}
    assert lengths(max_context_tokens=4096, max_output_tokens=96, max_prompt_tokens=4096) == {(4000, 96)}


def test_every_request_states_the_same_limit_but_for_what_its_context_leaves() -> None:
    def limits(**settings: Any) -> set[int]:
        workload = Burst(prompt_tokens=500, output_tokens=60, **settings)
        return {r.request.max_tokens for r in workload.requests(models=["m"], seed=0)}

    assert limits() == {8192}, "no public trace has an answer as long"
    assert limits(max_output_tokens=1000) == {1000}
    assert limits(max_output_tokens=10) == {10}
    assert limits(max_context_tokens=1500) == {1000}
    assert limits(max_context_tokens=1500, max_output_tokens=999) == {999}
    assert limits(max_context_tokens=100) == {60}, "the prompt is cut to make room for the answer"
    with pytest.raises(UserError, match="max_output_tokens must be a number"):
        limits(max_output_tokens=None)


def test_limits_are_lowered_to_what_kv_memory_holds() -> None:
    sent = [traced(0, 0.0, "a", 100, 50, 900), traced(1, 0.0, "b", 100, 50, 900), traced(2, 0.0, "b", 450, 50, 900)]
    found, cut = bounded([*sent, traced(3, 0.0, "b", 500, 1, 9)], {"a": 1000, "b": 500})
    assert [(r.request.max_tokens, r.output_tokens, r.answer_tokens) for r in found] == [
        (900, 50, 50),
        (400, 50, 50),
        (50, 50, 50),
        (1, 1, 1),
    ]
    assert cut == 0
    assert found[0] is sent[0]
    assert found[3].request.kv_tokens == 501, "refused by whoever routes it"
    found, cut = bounded([traced(0, 0.0, "a", 960, 50, 900), sent[0]], {"a": 1000})
    assert ([r.answer_tokens for r in found], cut) == ([40, 50], 1)


def test_zipf_shares_and_the_exponent() -> None:
    workload = ConstantRate(rate_rps=100, duration_s=200)
    models = [r.model for r in workload.requests(models=["a", "b", "c"], seed=1)]
    shares = [models.count(name) / len(models) for name in "abc"]
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.015)
    flat = [r.model for r in ConstantRate(rate_rps=100, duration_s=200, zipf_exponent=0.0).requests(models=["a", "b"], seed=1)]
    assert flat.count("a") / len(flat) == pytest.approx(0.5, abs=0.015)


def test_traces_go_to_the_first_model_unless_asked(path: str) -> None:
    assert {r.model for r in ArrivalsTrace(path=path).requests(models=["a", "b"], seed=0)} == {"a"}
    spread = ArrivalsTrace(path=path, repeat=20, popularity="zipf").requests(models=["a", "b"], seed=0)
    assert {r.model for r in spread} == {"a", "b"}


def test_models_and_lengths_leave_arrivals_alone() -> None:
    base = times(BurstyWorkload(), seed=5)
    for change in (
        {"popularity": "first"},
        {"lengths": "fixed"},
        {"lengths": "burstgpt"},
        {"zipf_exponent": 2.0},
        {"max_context_tokens": 8},
    ):
        assert times(BurstyWorkload(**change), seed=5) == base
    requests = BurstyWorkload().requests(models=["a", "b", "c"], seed=5)
    assert [r.arrival_s for r in requests] == base


@pytest.mark.parametrize(
    "field",
    [
        {"time_compression": 0.0},
        {"time_compression": -1.0},
        {"time_compression": float("nan")},
        {"rate_scale": -0.1},
        {"rate_scale": float("inf")},
        {"repeat": 0},
        {"limit": -1},
        {"max_prompt_tokens": 0},
        {"max_context_tokens": 1},
        {"zipf_exponent": -1.0},
        {"popularity": "uniform"},
        {"repeat": 1.5},
        {"limit": True},
    ],
)
def test_settings_out_of_range_name_field_and_value(field: dict[str, Any]) -> None:
    name, value = next(iter(field.items()))
    with pytest.raises(UserError, match=rf"Burst\.{name} must be .*{value!r}"):
        Burst(**field)


@pytest.mark.parametrize(
    ("models", "seed", "complaint"), [([], 0, "at least one"), (["a", "a"], 0, "differ"), (["a"], -1, "seed")]
)
def test_models_and_seed_are_checked(models: list[str], seed: int, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Burst().requests(models=models, seed=seed)
