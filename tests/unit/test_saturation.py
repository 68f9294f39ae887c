"""Verdicts on a load, the search for the rate that overloads, and the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lambdascale.cli.main import main
from lambdascale.core import UserError
from lambdascale.experiments import rate_search
from lambdascale.experiments.rate_search import Point, _bracket
from lambdascale.metrics.saturation import Saturation, saturation


def load(wait: Callable[[float], float], serve: float = 1.0, count: int = 400, failed: int = 0) -> pd.DataFrame:
    """Arrivals at 4/s; each waits ``wait(arrival)`` for a place and is served for ``serve`` seconds; the last ones fail."""
    arrival = np.arange(count) / 4
    queue = np.array([wait(at) for at in arrival])
    frame = pd.DataFrame(
        {"arrival_s": arrival, "dispatched_s": arrival + queue, "finished_s": arrival + queue + serve, "status": "ok"}
    )
    frame.loc[count - failed :, ["dispatched_s", "finished_s"]] = None
    frame.loc[count - failed :, "status"] = "failed"
    return frame.assign(e2e_s=frame.finished_s - frame.arrival_s)


@pytest.mark.parametrize(
    ("rows", "verdict", "growth"),
    [
        (load(lambda at: 0.0), "STABLE", 0.0),
        (load(lambda at: 0.9), "STABLE", 0.0),
        (load(lambda at: 1.5), "BACKLOGGED", 0.0),  # a queue that does not grow, and never ends
        (load(lambda at: 0.05 * at, serve=10), "STABLE", 1 - 1 / 1.05),
        (load(lambda at: 0.05 * at), "BACKLOGGED", 1 - 1 / 1.05),
        (load(lambda at: 0.5 * at), "OVERLOADED", 1 - 1 / 1.5),  # two of three are answered
        (load(lambda at: max(0.0, 40 - at)), "STABLE", 0.0),  # a cold start that is over in the second half
        (load(lambda at: 0.0, failed=5), "OVERLOADED", 0.0),
        (load(lambda at: 0.0, failed=4), "STABLE", 0.0),
    ],
)
def test_verdicts(rows: pd.DataFrame, verdict: str, growth: float) -> None:
    found = saturation(rows)
    assert found.verdict == verdict
    assert found.growth == pytest.approx(growth, abs=0.01)


@pytest.mark.parametrize(
    ("rows", "says"),
    [(load(lambda at: 0.0, count=99), "99 requests are too few"), (load(lambda at: 0.0).assign(arrival_s=1.0), "at once")],
)
def test_no_verdict(rows: pd.DataFrame, says: str) -> None:
    with pytest.raises(UserError, match=says):
        saturation(rows)


def point(factor: float, overloaded: bool) -> Point:
    return Point(factor, Path(), {}, Saturation("OVERLOADED" if overloaded else "STABLE", 0, 0))


@pytest.mark.parametrize(
    ("limit", "bracket", "tried"),
    [(5.0, (4.0, 8.0), [1, 2, 4, 8]), (0.3, (0.25, 0.5), [1, 0.5, 0.25]), (1.0, (1.0, 2.0), [1, 2])],
)
def test_the_bracket_holds_the_limit(limit: float, bracket: tuple[float, float], tried: list[float]) -> None:
    factors: list[float] = []

    def attempt(factor: float) -> Point:
        factors.append(factor)
        return point(factor, factor > limit)

    assert _bracket(attempt) == bracket
    assert factors == tried


@pytest.mark.parametrize(("always", "says"), [(False, "no rate up to"), (True, "every rate down to")])
def test_a_limit_out_of_reach(always: bool, says: str) -> None:
    with pytest.raises(UserError, match=says):
        _bracket(lambda factor: point(factor, always))


def test_refinements_halve_what_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rate between the two at the end, geometrically; the points come back by rate."""
    asked: list[float] = []

    def run(config: Any) -> Any:
        asked.append(config.workload.rate_rps)
        return SimpleNamespace(folder=Path(), summary={})

    monkeypatch.setattr(rate_search, "run", run)
    monkeypatch.setattr(rate_search.pd, "read_parquet", lambda path: None)
    monkeypatch.setattr(rate_search, "saturation", lambda rows: point(0, asked[-1] > 11).saturation)
    points = rate_search.search_rate(["workload=constant", "workload.rate_rps=2.0"], 2, lambda found: None)
    assert asked == pytest.approx([2, 4, 8, 16, 8 * 2**0.5, 8 * 2**0.25])
    assert [found.factor for found in points] == sorted(found.factor for found in points)


class TestCommand:
    """The command as a user runs it."""

    def test_until_overloaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.chdir(tmp_path)
        small = ["cluster.nodes=1", "workload.duration_s=60", "workload.lengths=fixed", "workload.output_tokens=16"]
        assert main(["sweep-rate", *small, "--refine", "0", "--out", "rates.csv"]) == 0
        table = pd.read_csv("rates.csv")
        assert table.verdict.iloc[-1] == "OVERLOADED"
        assert "STABLE" in set(table.verdict)
        assert table.requested_per_s.is_monotonic_increasing
        assert set(table.backend) == {"sim"}
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == len(table) + 3
        assert shown[-1].startswith("stable up to ")
        assert shown[-1].endswith("(simulated)")

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--refine", "-1"], "--refine must be"),
            (["--out", "rates.txt"], "must name a .csv file"),
            (["fast"], "KEY=VALUE, unlike fast"),
            (["workload.rate_rps=0"], "to raise"),
            (["experiment=quickstart", "workload.rate_scale=0"], "to raise"),
            (["workload.duration_s=3"], "too few"),
            (["workload=bursty", "workload.duration_s=20"], "too few"),  # the rate of any workload is scaled
            (["workload.nonsense=3"], "nonsense"),
        ],
    )
    def test_mistakes(
        self,
        arguments: list[str],
        says: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["sweep-rate", *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
