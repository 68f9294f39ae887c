"""Timelines of a live scale-out: every node's file, on the controller's clock, and answers as without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lambdascale.calibration import scaleout_parts
from lambdascale.calibration.scaleout_parts import ControllerRows
from lambdascale.checkpoints import PackedModel
from tests.live.harness import Watcher, burst, expected, pack_tiny, run, system_of

pytestmark = pytest.mark.live
REQUESTS = burst(32)


class Rows(Watcher, ControllerRows):
    """ControllerRows with the attributes that the harness gives to watchers."""

    def __init__(self) -> None:
        ControllerRows.__init__(self)

    on_event = ControllerRows.on_event
    on_command = ControllerRows.on_command


@pytest.mark.parametrize("kv", ["recompute", "copy"])
def test_a_scale_out_leaves_its_parts(tmp_path: Path, kv: str) -> None:
    tiny, folder, rows = pack_tiny(tmp_path), tmp_path / "timeline", Rows()
    system = system_of("lambdascale", f"system.kv={kv}", "+system.start.pipelines.form=always")
    outcome = run(tiny, REQUESTS, system=system, executor="torch", watchers=[rows], timeline=str(folder))
    rows.write(folder)
    assert outcome.answers == expected(PackedModel.open(tiny, "tiny"), REQUESTS)
    controller, nodes = scaleout_parts.read(folder)
    assert set(nodes.node) == {0, 1, 2, 3}
    assert {"start", "make runner", "pass", "run", "switch", "close runner"} <= set(nodes.what)
    assert set(nodes.detail[nodes.what == "switch"]) == {kv}
    assert {"pipeline", "replica", "switch", "last block", "first token"} <= set(scaleout_parts.steps(controller).what)
    ends = nodes.at_s + nodes.took_s
    assert ((nodes.at_s >= -60) & (ends <= controller.at_s.max() + 60)).all()
    runs, passes = nodes[nodes.what == "run"], nodes[nodes.what == "pass"]
    assert runs.took_s.sum() <= passes.took_s.sum()
