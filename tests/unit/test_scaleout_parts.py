"""Parts of a scale-out from the files that controller and nodes leave: on one clock, and added up within the time asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lambdascale.calibration import scaleout_parts
from lambdascale.calibration.scaleout_parts import ControllerRows
from lambdascale.core import Request, Stage
from lambdascale.core.commands import AllocateNode, Serve, SwitchMode
from lambdascale.core.events import BlockArrived, RequestArrived, RequestFinished, TokensProduced
from lambdascale.live.config import LiveConfig
from lambdascale.live.node.timeline import Timeline


def ticking(times: list[float]) -> Iterator[float]:
    yield from times


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A request at 100 s of the clock; a pipeline of nodes 1 and 2 from 101 to 103 s, when node 1 begins to serve alone."""
    clock = ticking([100.0, 100.5, 101.0, 101.4, 102.9, 103.0, 103.0, 103.3, 104.0])
    rows = ControllerRows(clock=lambda: next(clock))
    rows.on_event(RequestArrived(0.0, Request(7, 0.0, "m", 4, 8)))
    rows.on_command(0.5, AllocateNode(1, "m", 1))
    rows.on_command(1.0, Serve(5, "m", (Stage(1, 0, 1), Stage(2, 2, 3)), (1, 1, 1, 1), 100))
    rows.on_event(TokensProduced(1.4, 5, 7, 1, "pipeline"))
    rows.on_event(BlockArrived(2.9, 0, 1, "m", 3))
    rows.on_command(3.0, Serve(6, "m", (Stage(1, 0, 3),), (1, 1, 1, 1), 100))
    rows.on_command(3.0, SwitchMode(5, ((7, 6),), "recompute"))
    rows.on_event(TokensProduced(3.3, 6, 7, 1, "local"))
    rows.on_event(RequestFinished(4.0, 6, 7, 2))
    rows.write(tmp_path)
    # A part ends after what it contains.
    times = ticking(
        [101.004, 101.008, 101.012, 101.2, 103.01, 103.02, 103.05, 103.06, 103.10, 103.11, 103.25, 103.26, 103.5, 103.6]
    )
    timeline = Timeline(tmp_path, 1, clock=lambda: next(times))
    with timeline.part("start", instance=5):
        pass
    with timeline.part("pass", instance=5):
        pass
    with timeline.part("start", instance=6), timeline.part("make runner", layers=4):
        pass
    with timeline.part("pass", instance=6), timeline.part("run", prefilled=9, decodes=0) as row:
        row["detail"] = "kernels"
    with timeline.part("run", prefilled=0, decodes=1) as row:
        row["detail"] = "recorded"
    timeline.close()
    return tmp_path


def test_steps_in_order_from_the_first_request(folder: Path) -> None:
    controller, _ = scaleout_parts.read(folder)
    steps = scaleout_parts.steps(controller)
    assert [(round(s.at_s, 3), s.what, s.first, s.second) for s in steps.itertuples()] == [
        (0.5, "allocate", 1, -1),
        (1.0, "pipeline", 1, 5),
        (1.4, "first token", 7, 5),
        (2.9, "last block", 1, 3),
        (3.0, "replica", 1, 6),
        (3.0, "switch", 5, 1),
        (3.3, "first token", 7, 6),
    ]


def test_an_instance_s_parts(folder: Path) -> None:
    pipeline, replica = scaleout_parts.gaps(*scaleout_parts.read(folder)).round(3).to_dict("records")
    assert pipeline == {
        "what": "pipeline",
        "node": 1,
        "instance": 5,
        "served_s": 1.0,
        "start_ms": 4.0,
        "made_ms": 4.0,
        "first_pass_ms": 12.0,
        "first_pass_took_ms": 188.0,
        "first_token_ms": 400.0,
    }
    assert replica == {
        "what": "replica",
        "node": 1,
        "instance": 6,
        "served_s": 3.0,
        "start_ms": 10.0,
        "made_ms": 50.0,
        "first_pass_ms": 100.0,
        "first_pass_took_ms": 160.0,
        "first_token_ms": 300.0,
    }


def test_work_is_told_apart_and_counted_where_it_begins(folder: Path) -> None:
    _, nodes = scaleout_parts.read(folder)
    found = {row.what: (row.ms, row.count) for row in scaleout_parts.busy(nodes, 3.0, 3.2).itertuples()}
    assert found == {"start": (50.0, 1), "make runner": (30.0, 1), "pass": (160.0, 1), "prefill kernels": (140.0, 1)}
    late = {row.what: row.ms for row in scaleout_parts.busy(nodes, 3.2, 9.0).itertuples()}
    assert late == {"recorded": 100.0}


def test_tokens_by_time(folder: Path) -> None:
    controller, _ = scaleout_parts.read(folder)
    assert scaleout_parts.tokens_by(controller, [1.0, 2.0, 5.0]).to_dict("list") == {
        "by_s": [1.0, 2.0, 5.0],
        "first": [0, 1, 1],
        "ended": [0, 0, 1],
    }


def test_a_restarted_node_adds_to_its_file(tmp_path: Path) -> None:
    for _ in range(2):
        timeline = Timeline(tmp_path, 3)
        with timeline.part("drop"):
            pass
        timeline.close()
    assert [line.split(",")[3] for line in (tmp_path / "node-3.csv").read_text().splitlines()] == ["what", "drop", "drop"]


def test_only_the_engine_has_a_timeline() -> None:
    with pytest.raises(ValueError, match=r"backend\.timeline .* not timed"):
        LiveConfig(timeline="x", executor="timed")
