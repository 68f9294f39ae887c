"""Intervals of comparisons: coverage on synthetic runs, the worth of pairing, and the cases without an interval."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lambdascale.core import UserError
from lambdascale.metrics.intervals import FEWEST, RunRows, blocks_of, over_draws, paired, weighted_quantile

GAP_S = 20.0


def run_of(arrival_s: np.ndarray, ttft_s: np.ndarray, gpu_s: np.ndarray | None = None) -> RunRows:
    """A run whose requests finish with their first token; each request holds one GPU for ``gpu_s`` from its arrival."""
    held = ttft_s if gpu_s is None else gpu_s
    frame = pd.DataFrame(
        {"request_id": range(len(arrival_s)), "arrival_s": arrival_s, "ttft_s": ttft_s, "finished_s": arrival_s + ttft_s}
    )
    at_s = np.concatenate([arrival_s, arrival_s + held])
    delta = np.repeat([1, -1], len(arrival_s))
    end_s = float(at_s.max()) if len(at_s) else 0.0
    return RunRows(requests=frame, gpus=pd.DataFrame({"at_s": at_s, "delta": delta}), end_s=end_s)


def alone(run: RunRows) -> RunRows:
    """The same waits, each request in a burst of its own."""
    return run_of(np.arange(len(run.requests)) * GAP_S, run.requests.ttft_s.to_numpy())


def bursts(rng: np.random.Generator, count: int, size: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals in ``count`` bursts ``GAP_S`` apart; a load that the requests of a burst share (their dependence)."""
    arrival_s = np.repeat(np.arange(count) * GAP_S, size) + np.tile(np.arange(size) * 0.01, count)
    return arrival_s, np.repeat(rng.lognormal(0.0, 0.4, count), size)


def two_runs(rng: np.random.Generator, count: int, factor: float) -> tuple[RunRows, RunRows]:
    arrival_s, load = bursts(rng, count)
    arrival_s = arrival_s + rng.random()
    noise = [rng.lognormal(0.0, 0.1, len(load)) for _ in range(2)]
    return run_of(arrival_s, load * noise[0]), run_of(arrival_s, factor * load * noise[1])


class TestBlocks:
    def test_a_block_begins_when_both_runs_are_idle_and_the_one_before_was_long_enough(self) -> None:
        arrival_s = np.array([0.0, 1.0, 20.0, 22.0, 40.0, 60.0])
        one = np.array([0.5, 19.0, 21.0, 23.0, 41.0, 61.0])
        other = np.array([0.5, 1.5, 21.0, 23.0, 61.0, 62.0])
        assert blocks_of(arrival_s, [one, one]).tolist() == [0, 0, 1, 1, 2, 3]
        assert blocks_of(arrival_s, [one, other]).tolist() == [0, 0, 1, 1, 2, 2], "the other run was busy at 60"
        assert blocks_of(arrival_s, [one, one], memory_s=0.0).tolist() == [0, 1, 2, 3, 4, 5]
        assert blocks_of(arrival_s, [one, one], memory_s=30.0).tolist() == [0, 0, 0, 0, 1, 1]

    def test_an_old_request_that_runs_on_keeps_the_system_busy(self) -> None:
        arrival_s = np.array([0.0, 20.0, 40.0])
        assert blocks_of(arrival_s, [np.array([50.0, 21.0, 41.0])]).tolist() == [0, 0, 0]

    def test_an_unfinished_request_does_not_count(self) -> None:
        assert blocks_of(np.array([0.0, 20.0]), [np.array([np.nan, 21.0])]).tolist() == [0, 1]


def test_the_weighted_quantile_is_numpys_of_the_repeated_values() -> None:
    rng = np.random.default_rng(3)
    values, weights = np.sort(rng.random(40)), rng.integers(0, 4, (50, 40))
    wanted = [np.percentile(np.repeat(values, row), 90) for row in weights]
    assert weighted_quantile(values, weights, 0.9) == pytest.approx(wanted)
    assert math.isnan(weighted_quantile(values, np.zeros((1, 40), dtype=np.int64), 0.9)[0])
    assert weighted_quantile(values[:1], np.ones((1, 1), dtype=np.int64), 0.9) == values[0]


class TestCoverage:
    """The true ratio is known; it must be inside about 95 of 100 intervals."""

    def test_blocks_of_one_trace(self) -> None:
        found = [paired([two_runs(np.random.default_rng(s), 30, 2.0)]) for s in range(80)]
        for name in ("p90", "gpu"):
            inside = np.mean([getattr(one, name).low <= 2.0 <= getattr(one, name).high for one in found])
            assert 0.87 <= inside <= 1.0, name
            wide = np.median([getattr(one, name).high / getattr(one, name).low for one in found])
            assert wide < 1.25, f"{name}: an interval that says nothing"

    def test_bursts_as_blocks_cover_where_single_requests_would_not(self) -> None:
        """Requests of a burst share their luck: taken for independent ones they promise too much."""
        burst = []
        for s in range(40):
            rng = np.random.default_rng(s)
            arrival_s, load = bursts(rng, 20, size=12)
            shared = np.repeat(rng.lognormal(0.0, 0.3, 20), 12)
            burst.append((run_of(arrival_s, load), run_of(arrival_s, 2.0 * load * shared)))
        blocks = [paired([pair]).gpu for pair in burst]
        assert np.mean([one.low <= 2.0 * math.exp(0.045) <= one.high for one in blocks]) >= 0.85
        spread_out = [paired([(alone(ours), alone(theirs))]).gpu for ours, theirs in burst]
        assert np.mean([one.low <= 2.0 * math.exp(0.045) <= one.high for one in spread_out]) < 0.7

    def test_seeds_of_a_generator(self) -> None:
        found = []
        for s in range(80):
            rng = np.random.default_rng(s)
            found.append(paired([two_runs(rng, 10, 2.0) for _ in range(8)]))
        for name in ("p90", "longest", "gpu"):
            inside = np.mean([getattr(one, name).low <= 2.0 <= getattr(one, name).high for one in found])
            assert 0.87 <= inside <= 1.0, name
        assert (found[0].traces, found[0].blocks, found[0].p90.method) == (8, 0, "8 seeds, t")


def test_pairs_say_more_than_runs_for_themselves() -> None:
    pairs = [two_runs(np.random.default_rng(1), 40, 2.0)]
    together, apart = paired(pairs), paired(pairs, independent=True)
    for one, other in ((together.p90, apart.p90), (together.gpu, apart.gpu)):
        assert one.value == other.value
        assert one.high - one.low < 0.6 * (other.high - other.low)


def test_the_value_is_that_of_the_whole_runs_and_the_same_seed_gives_the_same_interval() -> None:
    ours, theirs = two_runs(np.random.default_rng(1), 20, 2.0)
    found = paired([(ours, theirs)])
    waits = [np.percentile(run.requests.ttft_s, 90) for run in (ours, theirs)]
    assert found.p90.value == pytest.approx(waits[1] / waits[0])
    assert found.gpu.value == pytest.approx(theirs.requests.ttft_s.sum() / ours.requests.ttft_s.sum())
    assert found.longest.value == pytest.approx(theirs.requests.ttft_s.max() / ours.requests.ttft_s.max())
    assert (found.blocks, found.traces, found.requests) == (20, 1, 100)
    assert paired([(ours, theirs)]) == found
    assert paired([(ours, theirs)], seed=1).p90 != found.p90


def test_draws_on_one_trace_share_its_blocks() -> None:
    """Five runs with other set-ups are no five traces: the interval is as wide as that of one."""
    arrival_s, load = bursts(np.random.default_rng(1), 25)
    rng = np.random.default_rng(2)
    shared = np.repeat(rng.lognormal(0.0, 0.3, 25), 5)
    pairs = [
        (run_of(arrival_s, load), run_of(arrival_s, 2 * load * shared * rng.lognormal(0, 0.01, len(load)))) for _ in range(5)
    ]
    one, five = paired(pairs[:1]), paired(pairs)
    assert (five.traces, five.blocks) == (1, 25)
    assert five.gpu.high - five.gpu.low > 0.8 * (one.gpu.high - one.gpu.low)


class TestNoInterval:
    def test_a_run_that_is_never_idle(self) -> None:
        arrival_s = np.arange(50.0)
        ours, theirs = (run_of(arrival_s, np.full(50, wait)) for wait in (1.5, 3.0))
        found = paired([(ours, theirs)])
        assert (found.p90.value, found.p90.known, found.p90.method, found.blocks) == (2.0, False, "1 block: too few", 1)
        assert not found.gpu.known

    def test_fewer_blocks_than_mean_anything(self) -> None:
        enough = paired([two_runs(np.random.default_rng(1), FEWEST, 2.0)])
        too_few = paired([two_runs(np.random.default_rng(1), FEWEST - 1, 2.0)])
        assert (enough.p90.known, too_few.p90.known) == (True, False)

    def test_no_requests(self) -> None:
        nothing = run_of(np.empty(0), np.empty(0))
        found = paired([(nothing, nothing)])
        assert math.isnan(found.p90.value)
        assert (found.p90.known, found.p90.method, found.requests) == (False, "no requests", 0)

    def test_a_run_that_answered_nothing(self) -> None:
        ours, theirs = two_runs(np.random.default_rng(1), 10, 2.0)
        silent = RunRows(requests=theirs.requests.assign(ttft_s=np.nan, finished_s=np.nan), gpus=theirs.gpus, end_s=theirs.end_s)
        assert paired([(ours, silent)]).p90.method == "a run without answers"

    def test_two_seeds(self) -> None:
        assert over_draws([2.0, 3.0]).method == "2 seeds: too few"
        assert over_draws([2.0]).method == "1 seed: too few"

    def test_nothing_drawn(self) -> None:
        exact = over_draws([2.0] * 3)
        assert (exact.low, exact.high) == (2.0, 2.0)


def test_students_t_of_ten_draws() -> None:
    """2.262 for nine degrees of freedom, by any table."""
    logs = np.array([-1.0, 1.0] * 5)
    found = over_draws(np.exp(logs).tolist())
    assert math.log(found.high) == pytest.approx(2.262 * logs.std(ddof=1) / math.sqrt(10), rel=2e-3)


def test_runs_of_different_requests_are_no_pair() -> None:
    (ours, theirs), (other, _) = two_runs(np.random.default_rng(1), 10, 2.0), two_runs(np.random.default_rng(1), 11, 2.0)
    with pytest.raises(UserError, match=r"different requests \(50 and 55\)"):
        paired([(ours, other)])
    late = RunRows(requests=theirs.requests.assign(arrival_s=theirs.requests.arrival_s + 1), gpus=theirs.gpus, end_s=theirs.end_s)
    with pytest.raises(UserError, match="no pair"):
        paired([(ours, late)])
    with pytest.raises(UserError, match="nothing to compare"):
        paired([])


def test_rows_are_paired_by_id_whatever_their_order() -> None:
    ours, theirs = two_runs(np.random.default_rng(1), 10, 2.0)
    shuffled = RunRows(requests=theirs.requests.sample(frac=1, random_state=1), gpus=theirs.gpus, end_s=theirs.end_s)
    assert paired([(ours, shuffled)]) == paired([(ours, theirs)])
