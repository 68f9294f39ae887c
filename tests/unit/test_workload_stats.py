"""Trace statistics, on made-up arrivals and on the real traces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lambdascale.core import UserError
from lambdascale.workload import ArrivalsTrace, AzureTrace, BurstGptTrace, RateSeriesWorkload, TraceStats, spikes, trace_stats

TRACES = Path(__file__).resolve().parents[2].parent / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason=f"the real traces are not at {TRACES}")


def stats_of(workload: ArrivalsTrace | AzureTrace) -> TraceStats:
    return trace_stats([r.arrival_s for r in workload.requests(models=["m"], seed=0)])


@needs_traces
def test_statistics_of_the_authors_trace() -> None:
    stats = stats_of(ArrivalsTrace(path=str(TRACES / "lambdascale_30min_arrivals.txt")))
    assert (stats.requests, round(stats.span_s, 1)) == (498, 1762.8)
    assert stats.mean_rps == pytest.approx(0.283, abs=0.001)
    assert stats.gap_cv == pytest.approx(2.11, abs=0.005)
    assert list(stats.fano.values()) == pytest.approx([2.8, 5.7, 7.1], abs=0.05)
    assert list(stats.peak_to_mean.values()) == pytest.approx([31.9, 7.1, 2.6], abs=0.05)
    assert list(stats.busiest.values()) == [9, 20, 43]
    assert stats.empty_share[1] == pytest.approx(0.846, abs=0.0005)


@needs_traces
def test_statistics_of_the_azure_conversation_trace() -> None:
    path = str(TRACES / "AzureLLMInferenceTrace_conv.csv")
    stats = stats_of(AzureTrace(path=path))
    assert (stats.requests, round(stats.span_s)) == (19_366, 3502)
    assert stats.mean_rps == pytest.approx(5.53, abs=0.005)
    assert stats.gap_cv == pytest.approx(1.09, abs=0.005)
    assert list(stats.fano.values()) == pytest.approx([1.39, 4.0, 20.6], abs=0.05)
    assert list(stats.peak_to_mean.values()) == pytest.approx([2.9, 1.8, 1.5], abs=0.05)
    arrivals = [r.arrival_s for r in AzureTrace(path=path).requests(models=["m"], seed=0)]
    assert len(spikes(arrivals, factor=2)) == 1


@needs_traces
def test_the_azure_trace_is_read_exactly() -> None:
    requests = AzureTrace(path=str(TRACES / "AzureLLMInferenceTrace_conv.csv")).requests(models=["m"], seed=0)
    assert requests[-1].arrival_s == 3501.721937
    assert (requests[-1].prompt_tokens, requests[-1].output_tokens) == (197, 183)
    assert max(r.prompt_tokens for r in requests) == 14_050
    assert max(r.output_tokens for r in requests) == 1_000


@needs_traces
@pytest.mark.parametrize(("name", "span_s"), [("BurstGPT_1_dense_120.csv", 4), ("BurstGPT_1_span30s_120.csv", 30)])
def test_the_burstgpt_samples_are_read_whole(name: str, span_s: float) -> None:
    loaded = BurstGptTrace(path=str(TRACES / name), check_units=False).load(models=["m"], seed=0)
    assert len(loaded.requests) + loaded.provenance.dropped_failures == loaded.provenance.rows == 120
    assert loaded.requests[-1].arrival_s == span_s


@needs_traces
def test_the_burstgpt_rate_series_is_followed() -> None:
    workload = RateSeriesWorkload(path=str(TRACES / "burstgpt_rate_series.txt"), start_s=6000.0, duration_s=3600.0)
    rates = np.loadtxt(workload.path or "")[100:160]
    requests = workload.requests(models=["m"], seed=0)
    assert len(requests) == pytest.approx(60 * rates.sum(), rel=0.05)


def test_a_regular_train_of_requests() -> None:
    stats = trace_stats(np.arange(0, 121) + 1000.0)
    assert stats.gap_cv == 0
    assert stats.fano[1] == 0
    assert stats.busiest == {1: 1, 10: 10, 60: 60}
    assert stats.empty_share == {1: 0, 10: 0, 60: 0}


def test_order_and_origin_do_not_matter() -> None:
    times = np.random.default_rng(0).exponential(size=500).cumsum()
    assert trace_stats(times[::-1]) == trace_stats(times)


def test_a_poisson_process_has_unit_fano_and_cv() -> None:
    stats = trace_stats(np.random.default_rng(0).exponential(0.1, size=40_000).cumsum())
    assert stats.gap_cv == pytest.approx(1, abs=0.03)
    assert stats.fano[1] == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("times", [[], [1.0], [2.0, 2.0], [0.0, float("nan")], [[0.0, 1.0]]])
def test_too_little_for_statistics(times: list[float]) -> None:
    with pytest.raises(UserError):
        trace_stats(times)


def test_a_spike_is_found_where_it_is() -> None:
    background = np.arange(0, 300.0)
    burst = 100 + np.linspace(0, 5, 200)
    (spike,) = spikes(np.concatenate([background, burst]), factor=10)
    assert 91 <= spike.start_s <= 98
    assert 99 <= spike.end_s <= 105
    assert spike.peak == pytest.approx(21, abs=0.5)
    assert spikes(background, factor=2) == ()
    assert spikes([0.0, 5.0], factor=2) == ()
