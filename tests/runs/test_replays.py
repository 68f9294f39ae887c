"""A run replays itself: the same requests, decisions and results from its own requests.parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from lambdascale.core import TraceError
from lambdascale.experiments.compose import compose
from lambdascale.experiments.mistakes import user_message
from lambdascale.experiments.runner import run
from lambdascale.workload import RecordedRun

BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def made(tmp_path: Path, name: str, *overrides: str) -> Path:
    return run(compose([f"out={tmp_path / name}", *overrides])).folder


def summary(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "summary.json").read_text())
    assert isinstance(found, dict)
    return {key: value for key, value in found.items() if key != "wall_s"}


def check_same(one: Path, two: Path) -> None:
    assert summary(one) == summary(two)
    for name in ("requests", "events", "gpus"):
        assert pq.read_table(one / f"{name}.parquet").equals(pq.read_table(two / f"{name}.parquet")), name


@pytest.mark.parametrize(
    "setting",
    [
        ["system=lambdascale"],
        ["system=nccl_broadcast", "seed=4"],
        ["model_count=5", "cluster.nodes=6"],
        # Answers cut by limits, nodes that die: failures of the run are not those of its trace.
        ["workload.max_output_tokens=100", "model=llama2_7b", "backend.node_failures=[[0,20.0],[1,30.0]]", "cluster.nodes=2"],
    ],
    ids=["lambdascale", "nccl_broadcast", "models", "failures"],
)
def test_to_the_digit(tmp_path: Path, setting: list[str]) -> None:
    """The first arrival is later than 0: moving it there would shift every decision."""
    workload = ["workload=constant", "workload.process=gamma", "workload.duration_s=60", "workload.lengths=azure"]
    first = made(tmp_path, "first", *workload, "workload.rate_rps=3", *setting)
    others = [each for each in setting if not each.startswith("workload.")]
    second = made(tmp_path, "second", "workload=run", f"workload.path={first}", *others)
    assert pd.read_parquet(first / "requests.parquet").arrival_s.min() > 0
    check_same(first, second)
    assert (summary(first)["requests"]["failed"] > 0) == ("cluster.nodes=2" in setting)
    check_same(first, made(tmp_path, "third", "workload=run", f"workload.path={second / 'requests.parquet'}", *others))


def test_an_experiment_whose_workload_is_rescaled(tmp_path: Path) -> None:
    """The settings of its workload are for another trace: they do not rescale what is recorded."""
    first = made(tmp_path, "first", "experiment=quickstart", "workload.duration_s=300")
    check_same(first, made(tmp_path, "second", "experiment=quickstart", f"replay={first}"))
    with pytest.raises(Exception, match="lengths") as caught:
        made(tmp_path, "third", "experiment=quickstart", "workload=run", f"workload.path={first}")
    assert "replay=FOLDER takes their place" in str(user_message(caught.value))


def test_failures_of_the_trace_and_sessions(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(BURSTGPT + "".join(f"{t},x,9,{t % 3},9,s{t % 2}\n" for t in range(90)))
    settings = ["workload=burstgpt", f"workload.path={trace}", "workload.failures=count", "workload.session_column=Log Type"]
    first = made(tmp_path, "first", *settings)
    found = summary(first)
    assert found["requests"] == {"submitted": 90, "completed": 60, "failed": 30}
    assert found["failures"] == {"traced": 30}
    rows = pd.read_parquet(first / "requests.parquet")
    assert rows[rows.status == "failed"].arrival_s.tolist() == list(range(0, 90, 3))
    assert rows.session[rows.arrival_s == 7].tolist() == ["s1"]
    second = made(tmp_path, "second", "workload=run", f"workload.path={first}")
    check_same(first, second)
    left = made(tmp_path, "third", "workload=run", f"workload.path={first}", "workload.failures=drop")
    assert summary(left)["requests"] == {"submitted": 60, "completed": 60, "failed": 0}
    assert json.loads((left / "manifest.json").read_text())["workload"]["dropped_failures"] == 30
    with pytest.raises(TraceError, match=r"requests.parquet: row 60 has no answer to replay .*failures=drop"):
        made(tmp_path, "fourth", "workload=run", f"workload.path={first}", "workload.failures=refuse")


def table(tmp_path: Path, **columns: list[Any]) -> str:
    base = {"arrival_s": [5.0, 9.0], "received_s": [5.5, 9.0], "model": ["b", "a"], "prompt_tokens": [3, 4]}
    base |= {"output_tokens": [7, None], "status": ["ok", "failed"]}
    path = tmp_path / "requests.parquet"
    pd.DataFrame({name: value for name, value in (base | columns).items() if value}).to_parquet(path)
    return str(path)


def test_a_live_run_as_its_front_end_received_it(tmp_path: Path) -> None:
    path = table(tmp_path, answer_tokens=[8, 6], max_tokens=[8, 9])
    found = RecordedRun(path=path, arrivals="received").requests(models=["a", "b"], seed=0)
    assert [(r.arrival_s, r.model, r.output_tokens, r.request.max_tokens) for r in found] == [(5.5, "b", 8, 8), (9.0, "a", 6, 9)]
    assert compose(["workload=recorded", f"workload.path={path}"]).workload.arrivals == "received"


def test_tables_without_answers_of_failed_requests(tmp_path: Path) -> None:
    loaded = RecordedRun(path=table(tmp_path)).load(models=["a", "b"], seed=0)
    assert [r.output_tokens for r in loaded.requests] == [7]
    assert [r.arrival_s for r in loaded.failed] == [9.0]


def test_a_window_keeps_the_time_before_its_first_arrival(tmp_path: Path) -> None:
    found = RecordedRun(path=table(tmp_path, answer_tokens=[8, 6]), start_s=3.0, duration_s=5.0).requests(
        models=["a", "b"], seed=0
    )
    assert [r.arrival_s for r in found] == [2.0]


def test_other_models(tmp_path: Path) -> None:
    path = table(tmp_path, answer_tokens=[8, 6])
    with pytest.raises(TraceError, match=r"the run served 'a', this one has x, y \(workload=run workload.match_models=order"):
        RecordedRun(path=path).requests(models=["x", "y"], seed=0)
    assert [r.model for r in RecordedRun(path=path, match_models="order").requests(models=["x", "y"], seed=0)] == ["y", "x"]


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"model": []}, "not the requests of a run: it has no column model"),
        ({"arrival_s": [5.0, None]}, "row 1: arrival_s must be from 0 to 1e[+]18, not nan"),
        ({"arrival_s": [-5.0, 1.0]}, "row 0: arrival_s"),
        ({"prompt_tokens": [3, -4]}, "row 1: prompt_tokens"),
        ({"prompt_tokens": ["x", "y"]}, "prompt_tokens must hold numbers"),
        ({"max_tokens": [8, None], "answer_tokens": [8, 6]}, "row 1: max_tokens"),
        ({"model": ["a", None]}, "row 1: model"),
    ],
)
def test_damaged_tables(tmp_path: Path, columns: dict[str, list[Any]], complaint: str) -> None:
    with pytest.raises(TraceError, match=f"requests.parquet: .*{complaint}|requests.parquet: {complaint}"):
        RecordedRun(path=table(tmp_path, **columns)).requests(models=["a", "b"], seed=0)


def test_places_that_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    for place, complaint in ((tmp_path, r"no such file \(the folder of a run"), (tmp_path / "x", "cannot read")):
        with pytest.raises(TraceError, match=complaint):
            RecordedRun(path=str(place)).requests(models=["a"], seed=0)
