"""Service-level objectives: what counts as good, what is refused, and the load served."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from lambdascale.core import UserError
from lambdascale.figures.slo_capacity import load_at
from lambdascale.metrics.slo import Slo, attainment


def row(
    model: str = "m", ttft: float | None = 0.5, tpot: float | None = 0.05, e2e: float | None = 1.0, status: str = "ok"
) -> Any:
    tokens = None if status != "ok" else 10
    return {"model": model, "ttft_s": ttft, "tpot_s": tpot, "e2e_s": e2e, "status": status, "output_tokens": tokens}


def good(setting: str | dict[str, str], *rows: dict[str, Any]) -> list[bool]:
    return Slo.parse(setting, ("m", "n")).good(pd.DataFrame(rows)).tolist()


@pytest.mark.parametrize(
    ("request_", "is_good"),
    [
        (row(), True),
        (row(ttft=1.0), True),  # a target is met at its limit
        (row(ttft=1.001), False),
        (row(tpot=0.101), False),
        (row(tpot=None), True),  # an answer of one token has no TPOT to miss
        (row(status="failed"), False),
        (row(ttft=None, tpot=None, e2e=None, status="failed"), False),
    ],
)
def test_a_request_is_good_if_it_completed_and_met_all_targets(request_: dict[str, Any], is_good: bool) -> None:
    assert good("ttft:1000 tpot:100", request_) == [is_good]


def test_targets_by_model() -> None:
    """A model's own targets replace the default ones; without either, to complete is enough."""
    slow = {"ttft": 2.0}
    assert good({"m": "ttft:3000", "default": "ttft:1000"}, row(**slow), row("n", **slow)) == [True, False]
    assert good({"m": "ttft:1000"}, row(**slow), row("n", **slow), row("n", status="failed")) == [False, True, False]


def test_the_whole_answer_has_a_target_too() -> None:
    assert good("e2el:900", row(), row(e2e=0.9)) == [False, True]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("", "no list of targets"),
        (7, "no list of targets"),
        ({"m": None}, "no list of targets"),
        ({"other": "ttft:1"}, "model 'other'; this run has m, n"),
        ("latency:5", "'latency:5'; it must be one of ttft, tpot, e2el"),
        ("ttft", "must be a positive number"),
        ("ttft:0", "must be a positive number"),
        ("ttft:-1", "must be a positive number"),
        ("ttft:nan", "must be a positive number"),
        ("ttft:inf", "must be a positive number"),
        ("ttft:1s", "must be a positive number"),
        ("ttft:5 ttft:6", "two targets for ttft"),
    ],
)
def test_a_wrong_setting_is_named(setting: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Slo.parse(setting, ("m", "n"))


def test_the_setting_is_said_again() -> None:
    assert Slo.parse("tpot:100 ttft:1000.5", ("m",)).text() == "tpot:100 ttft:1000.5"
    assert Slo.parse({"m": "ttft:1", "default": "e2el:2"}, ("m",)).text() == "m ttft:1, default e2el:2"


def test_attainment_counts_failures_as_misses() -> None:
    rows = pd.DataFrame([row(), row(), row(ttft=9.0), row(status="failed")])
    found = attainment(rows, Slo.parse("ttft:1000", ("m",)), duration_s=4.0, gpu_seconds=100.0, usd_per_gpu_hour=36.0)
    assert found == {
        "targets_ms": "ttft:1000",
        "met": 2,
        "attainment_percent": 50.0,
        "goodput_requests_per_s": 0.5,
        "goodput_tokens_per_s": 5.0,
        "gpu_seconds_per_request": 50.0,
        "usd_per_request": 0.5,
    }


def test_nothing_good_costs_no_number() -> None:
    slo = Slo.parse("ttft:1", ("m",))
    found = attainment(pd.DataFrame([row()]), slo, duration_s=0.0, gpu_seconds=1.0, usd_per_gpu_hour=1.0)
    assert (found["met"], found["goodput_requests_per_s"], found["usd_per_request"]) == (0, None, None)
    empty = attainment(pd.DataFrame([row()]).iloc[:0], slo, duration_s=0.0, gpu_seconds=0.0, usd_per_gpu_hour=1.0)
    assert (empty["met"], empty["attainment_percent"]) == (0, None)


@pytest.mark.parametrize(
    ("attained", "load"),
    [
        ([90.0, 80.0, 70.0], 0.0),  # never
        ([100.0, 99.0, 95.0], 4.0),  # to the end
        ([100.0, 95.0, 50.0], 2.0),  # at a measured load
        ([100.0, 90.0, 50.0], 1.5),  # between two
        ([90.0, 100.0, 50.0], 2.2),  # a dip at low load does not count
    ],
)
def test_the_load_served_at_95_percent(attained: list[float], load: float) -> None:
    assert load_at([1.0, 2.0, 4.0], attained, 95.0) == pytest.approx(load)
