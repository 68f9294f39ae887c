"""Run in the guest: the live cluster over rdma, and the pre-flight check of the guest's devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lambdascale.checkpoints import PackedModel
from lambdascale.cli.main import main
from lambdascale.core.commands import LoadBlocks, StartMulticast
from lambdascale.core.events import BlockArrived, ConnectionLost, NodeLost
from tests.live import harness
from tests.live.faults import Break, Damage, check_damage, inject

REQUESTS = harness.burst(12, prompt=10, output=8)
Serve = Callable[..., harness.Outcome]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.pack_tiny(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def expected(tiny: Path) -> dict[int, list[int]]:
    return harness.expected(PackedModel.open(tiny, "tiny"), REQUESTS)


@pytest.fixture
def serve(tiny: Path, expected: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Three nodes serve a burst; two of them get the model over rdma. Every node's tokens equal the engine's."""
    monkeypatch.setattr(harness, "PATIENCE_S", 400.0)
    system = harness.system_of("lambdascale")

    def run(*watchers: harness.Watcher) -> harness.Outcome:
        options = {"link": "1MB/s", "transport": "rdma", "executor": "torch", "silence_s": 120.0}
        outcome = harness.run(tiny, REQUESTS, system=system, nodes=3, watchers=watchers, **options)
        assert outcome.answers == expected
        assert (outcome.rows.status == "ok").all()
        return outcome

    return run


def test_a_scale_out_is_token_exact(serve: Serve) -> None:
    outcome = serve()
    plan = harness.of(outcome, StartMulticast)[0].plan
    arrived = {(event.node, event.block) for event in harness.of(outcome, BlockArrived)}
    assert {(node, block) for node in plan.destinations for block in range(8)} <= arrived


def test_a_damaged_block(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checksum detects a damaged block at its destination; a new plan brings the missing blocks over rdma, too."""
    inject(Damage(block=3), monkeypatch)
    outcome = serve()
    check_damage(outcome, block=3)
    assert not harness.of(outcome, NodeLost)
    assert not [load for load in harness.of(outcome, LoadBlocks) if load.tier != "instant"]


def test_a_queue_pair_fails(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue pair fails during a multicast while both nodes live: they connect again, and what was under way begins anew."""
    inject(Break(node=1, peer=2, after=2), monkeypatch)
    outcome = serve()
    assert not harness.of(outcome, NodeLost)
    assert {(event.node, event.peer) for event in harness.of(outcome, ConnectionLost)} == {(1, 2)}
    assert not [load for load in harness.of(outcome, LoadBlocks) if load.tier != "instant"]


def test_a_node_is_killed_in_a_multicast(serve: Serve) -> None:
    """The killed node receives blocks and forwards them; the other destination gets what is missing over rdma, by a new plan."""
    killer = harness.Watcher(
        lambda entry: isinstance(entry, BlockArrived) and entry.node == 1 and entry.transfer_id > 0,
        lambda backend: backend.launcher.kill(1),
    )
    outcome = serve(killer)
    assert [event.node for event in harness.of(outcome, NodeLost)] == [1]
    arrived = [event.block for event in harness.of(outcome, BlockArrived) if event.node == 2]
    assert sorted(arrived) == list(range(8)), "each once"
    first, *later = harness.of(outcome, StartMulticast)
    assert first.plan.destinations == (1, 2)
    assert later, "the death came before the end"
    assert {command.plan.destinations for command in later} == {(2,)}
    assert not [load for load in harness.of(outcome, LoadBlocks) if load.tier != "instant"]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--rdma", "--rdma-mib", "8", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["pyverbs"]["found"] == "the distribution's python3-pyverbs"
    assert checks["RDMA devices"]["status"] == checks["memory lock limit"]["status"] == "ok"
    for name in ("rxe0 port 1", "rxe1 port 1"):
        assert "a loopback write of 8 MiB is intact" in checks[name]["found"]
    assert "GID 1 (RoCE v2, 127.0.0.1), MTU 4096" in checks["rxe0 port 1"]["found"]
    assert "GID 1 (RoCE v2, 10.78.0.1), MTU 1024" in checks["rxe1 port 1"]["found"]
