"""Generators: their requests have the documented statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from lambdascale.core import TraceError, UserError
from lambdascale.workload import Burst, BurstyWorkload, ConstantRate, RateSeriesWorkload, trace_stats
from lambdascale.workload.processes import gamma_renewal
from lambdascale.workload.rate_series import follow_rate

Process = Literal["poisson", "uniform", "gamma"]


def arrivals(workload: Any, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([r.arrival_s for r in workload.requests(models=["m"], seed=seed)])


def test_the_cluster_process_has_the_medians_of_the_authors_trace() -> None:
    # Medians of many runs of 1,762.8 s: 498 requests, gap CV 1.91, Fano 2.3/4.7/5.2, busiest 1/10/60 s 7/19/39.5.
    stats = [trace_stats(arrivals(BurstyWorkload(duration_s=1762.8), seed)) for seed in range(300)]

    def median(values: list[float]) -> float:
        return float(np.median(values))

    assert median([s.requests for s in stats]) == pytest.approx(498, rel=0.03)
    assert median([s.gap_cv for s in stats]) == pytest.approx(1.91, rel=0.03)
    for window, fano, busiest in ((1, 2.3, 7), (10, 4.7, 19), (60, 5.2, 39.5)):
        assert median([s.fano[window] for s in stats]) == pytest.approx(fano, rel=0.06)
        assert median([s.busiest[window] for s in stats]) == pytest.approx(busiest, abs=1.0)


def test_a_longer_bursty_run_starts_with_the_shorter_one() -> None:
    short = BurstyWorkload(duration_s=600.0).requests(models=["a", "b"], seed=4)
    long = BurstyWorkload(duration_s=60_000.0).requests(models=["a", "b"], seed=4)
    assert len(long) > 50 * len(short)
    assert list(long[: len(short)]) == list(short)


def test_a_bursty_run_starts_at_once_and_ends_in_time() -> None:
    times = arrivals(BurstyWorkload(duration_s=300.0))
    assert times[0] == 0.0
    assert times[-1] < 300
    assert len(arrivals(BurstyWorkload(duration_s=0.0))) == 0


def test_bursty_lengths_are_the_azure_conversations_within_the_context() -> None:
    requests = BurstyWorkload(duration_s=100_000.0).requests(models=["m"], seed=0)
    prompts, outputs = (np.array([getattr(r, name) for r in requests]) for name in ("prompt_tokens", "output_tokens"))
    assert np.median(prompts) == pytest.approx(np.exp(6.63), rel=0.03)
    assert np.median(outputs) == pytest.approx(np.exp(5.02), rel=0.03)
    assert (prompts + outputs).max() == 4096
    assert min(prompts.min(), outputs.min()) >= 1
    assert abs(np.corrcoef(np.log(prompts), np.log(outputs))[0, 1]) < 0.05


def test_burstgpt_lengths_are_capped() -> None:
    requests = Burst(count=50_000, lengths="burstgpt").requests(models=["m"], seed=0)
    assert max(r.prompt_tokens for r in requests) == 6142
    assert max(r.output_tokens for r in requests) == 7315
    assert min(r.output_tokens for r in requests) == 1


@pytest.mark.parametrize(("process", "cv"), [("poisson", 1.0), ("gamma", 2.0)])
def test_constant_rates(process: Process, cv: float) -> None:
    times = arrivals(ConstantRate(rate_rps=20.0, duration_s=1000.0, process=process, gap_shape=0.25))
    gaps = np.diff(times)
    assert len(times) == pytest.approx(20_000, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_even_spacing() -> None:
    assert arrivals(ConstantRate(rate_rps=4.0, duration_s=1.0, process="uniform")).tolist() == [0, 0.25, 0.5, 0.75]
    assert arrivals(ConstantRate(rate_rps=4.0, duration_s=1.1, process="uniform"))[-1] == 1.0


@pytest.mark.parametrize("process", ["poisson", "uniform", "gamma"])
def test_no_rate_or_no_time_is_an_empty_run(process: Process) -> None:
    assert len(arrivals(ConstantRate(rate_rps=0.0, process=process))) == 0
    assert len(arrivals(ConstantRate(duration_s=0.0, process=process))) == 0


def test_burst() -> None:
    assert arrivals(Burst()).tolist() == [0.0] * 50
    spread = arrivals(Burst(count=200, at_s=3.0, spread_s=2.0))
    assert ((spread >= 3) & (spread < 5)).all()
    assert spread.max() - spread.min() > 1.9
    assert len(arrivals(Burst(count=0))) == 0


@pytest.mark.parametrize("shape", [0.2, 1.0, 5.0])
def test_a_renewal_process_is_stationary_from_its_start(shape: float) -> None:
    rng = np.random.default_rng(0)
    runs = 3000
    counts = sum(np.histogram(gamma_renewal(4.0, shape, rng), bins=4, range=(0, 4))[0] for _ in range(runs))
    assert np.array(counts) / runs == pytest.approx(np.ones(4), abs=0.13)


def test_a_rate_series_is_followed_on_average_and_not_where_it_is_zero() -> None:
    rng = np.random.default_rng(1)
    edges = np.array([0.0, 10.0, 20.0, 40.0, 50.0, 60.0])
    rates = np.array([0.0, 3.0, 0.0, 1.0, 0.0])
    runs = [follow_rate(edges, rates, 0.3, rng) for _ in range(1500)]
    counts = np.mean([np.histogram(times, bins=edges)[0] for times in runs], axis=0)
    assert counts == pytest.approx([0, 30, 0, 10, 0], rel=0.05)
    assert all((np.diff(times) >= 0).all() for times in runs)


def test_rescaled_gaps_of_a_rate_series_have_the_cv_asked_for() -> None:
    edges = np.arange(0.0, 1001.0, 10.0)
    rates = 5 + 4 * np.sin(edges[:-1] / 50)
    times = follow_rate(edges, rates, 0.25, np.random.default_rng(2))
    expected = np.concatenate([[0], np.cumsum(rates * 10)])
    gaps = np.diff(np.interp(times, edges, expected))
    assert gaps.mean() == pytest.approx(1, rel=0.08)
    assert gaps.std() / gaps.mean() == pytest.approx(2, rel=0.08)


def test_rate_series_file_and_window(tmp_path: Path) -> None:
    path = tmp_path / "rates.txt"
    path.write_text("# rps\n0\n100 # busy\n\n50\n")

    def count(**settings: Any) -> int:
        return len(arrivals(RateSeriesWorkload(path=str(path), bin_s=10, gap_shape=1000.0, **settings)))

    assert count() == pytest.approx(1500, abs=10)
    assert count(start_s=15.0) == pytest.approx(1000, abs=10)
    assert count(start_s=15.0, duration_s=6.0) == pytest.approx(550, abs=10)
    assert count(start_s=99.0) == count(duration_s=0.0) == count(duration_s=10.0) == 0
    times = arrivals(RateSeriesWorkload(path=str(path), bin_s=10, start_s=5.0, gap_shape=1000.0))
    assert times[0] == pytest.approx(5, abs=0.1)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("1\n-2\n", ":2: a rate"), ("1\nnan\n", ":2: a rate"), ("# no rows\n", "no rows"), ("1 2\n", ":1:")],
)
def test_bad_rate_series(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "rates.txt"
    path.write_text(content)
    with pytest.raises(TraceError, match=complaint):
        arrivals(RateSeriesWorkload(path=str(path)))


def test_missing_rate_series(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"workload\.path=FILE"):
        RateSeriesWorkload()
    with pytest.raises(TraceError, match="no such file"):
        arrivals(RateSeriesWorkload(path=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("cls", "field"),
    [
        (ConstantRate, {"rate_rps": -1.0}),
        (ConstantRate, {"rate_rps": float("inf")}),
        (ConstantRate, {"duration_s": float("nan")}),
        (ConstantRate, {"process": "weibull"}),
        (ConstantRate, {"gap_shape": 0.0}),
        (Burst, {"count": -1}),
        (Burst, {"count": 1.5}),
        (Burst, {"at_s": -1.0}),
        (Burst, {"spread_s": -1.0}),
        (BurstyWorkload, {"single_probability": 1.1}),
        (BurstyWorkload, {"short_gap_probability": -0.1}),
        (BurstyWorkload, {"followers_mean": 0.9}),
        (BurstyWorkload, {"silence_mean_s": 0.0}),
        (BurstyWorkload, {"duration_s": -1.0}),
        (BurstyWorkload, {"gap_scale_s": float("nan")}),
    ],
)
def test_settings_out_of_range(cls: Any, field: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"{cls.__name__}\.{next(iter(field))} must be"):
        cls(**field)


def test_repeated_bursts_begin_every_period() -> None:
    def begins(**settings: float | None) -> list[float]:
        return sorted({each.arrival_s for each in Burst(count=2, at_s=1.0, repeat=3, **settings).requests(models=["m"], seed=0)})

    assert begins() == [1.0, 2.0, 3.0]
    assert begins(period_s=5.0) == [1.0, 6.0, 11.0]
    with pytest.raises(UserError, match="period_s must be finite and at least 2"):
        Burst(spread_s=2.0, period_s=1.0)
