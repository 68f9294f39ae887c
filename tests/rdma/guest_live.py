"""Run in the guest: the live cluster over rdma; and what the pre-flight check says of the guest's devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lambdascale.checkpoints import PackedModel, pack
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.cli.main import main
from lambdascale.core.commands import StartMulticast
from lambdascale.core.events import BlockArrived
from tests.live import harness

NODES = 3


def test_a_scale_out_is_token_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other nodes get the model by a multicast over rdma; whoever answers, the tokens are the engine's."""
    monkeypatch.setattr(harness, "PATIENCE_S", 400.0)
    (tmp_path / "source").mkdir()
    write_random(PRESETS["tiny"], tmp_path / "source", seed=3)
    pack(tmp_path / "source", tmp_path / "tiny", 8)
    requests = harness.burst(12, prompt=10, output=20)
    outcome = harness.run(
        tmp_path / "tiny",
        requests,
        system=harness.system_of("lambdascale"),
        nodes=NODES,
        link="1MB/s",
        transport="rdma",
        executor="torch",
        silence_s=120.0,
    )
    assert outcome.answers == harness.expected(PackedModel.open(tmp_path / "tiny", "tiny"), requests)
    assert (outcome.rows.status == "ok").all()
    entries = [entry for _, entry in outcome.recorder.entries]
    (plan, *_) = [entry.plan for entry in entries if isinstance(entry, StartMulticast)]
    arrived = {(entry.node, entry.block) for entry in entries if isinstance(entry, BlockArrived)}
    assert {(node, block) for node in plan.destinations for block in range(8)} <= arrived


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--rdma", "--rdma-mib", "8", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["pyverbs"]["found"] == "the distribution's python3-pyverbs"
    assert checks["RDMA devices"]["status"] == checks["memory lock limit"]["status"] == "ok"
    for name in ("rxe0 port 1", "rxe1 port 1"):
        assert "8 MiB written to itself are intact" in checks[name]["found"]
    assert "GID 1 (RoCE v2, 127.0.0.1), MTU 4096" in checks["rxe0 port 1"]["found"]
    assert "GID 1 (RoCE v2, 10.78.0.1), MTU 1024" in checks["rxe1 port 1"]["found"]
