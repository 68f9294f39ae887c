"""The system behind ``lambdascale multicast``: one multicast after the other, each timed from command to last block."""

from __future__ import annotations

from pathlib import Path

import pytest

from lambdascale.calibration.multicast_rates import Repeated, link_rate, planned_s
from lambdascale.checkpoints import PackedModel, pack
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.cli.main import main
from lambdascale.core import ClusterSpec, UserError
from lambdascale.core.commands import LoadBlocks, ReleaseNode, SetTimer, StartMulticast
from lambdascale.core.events import BlockArrived, CommandFailed, NodeJoined, TimerFired
from lambdascale.live.config import LiveConfig
from lambdascale.multicast import BinomialPipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    root = tmp_path_factory.mktemp("rates")
    (root / "source").mkdir()
    write_random(PRESETS["tiny"], root / "source", seed=0)
    pack(root / "source", root / "packed", 2)
    return PackedModel.open(root / "packed")


def test_two_multicasts_from_two_sources(model: PackedModel) -> None:
    plan = BinomialPipeline().plan(sources=2, destinations=2, blocks=2)
    system = Repeated(model, plan, 2)
    joined = [command for node in range(4) for command in system.on_event(NodeJoined(0.0, node))]
    assert [(type(command), command.node) for command in joined if isinstance(command, LoadBlocks)] == [
        (LoadBlocks, 0),
        (LoadBlocks, 1),
    ]

    def arrive(nodes: tuple[int, int], number: int, at: float) -> list[object]:
        return [
            command
            for node in nodes
            for block in range(2)
            for command in system.on_event(BlockArrived(at, number, node, model.name, block))
        ]

    assert [type(command) for command in arrive((0, 1), 1, 1.0)] == [SetTimer]
    (first,) = system.on_event(TimerFired(2.0, 1))
    assert isinstance(first, StartMulticast)
    again = arrive((2, 3), first.transfer_id, 2.5)
    assert [type(command) for command in again] == [ReleaseNode, ReleaseNode, SetTimer]
    (second,) = system.on_event(TimerFired(3.0, 1))
    assert isinstance(second, StartMulticast)
    assert second.transfer_id != first.transfer_id
    assert arrive((2, 3), second.transfer_id, 3.25) == []
    assert system.seconds == [0.5, 0.25]


def test_a_failure_ends_the_measurement(model: PackedModel) -> None:
    system = Repeated(model, BinomialPipeline().plan(sources=1, destinations=1, blocks=2), 1)
    with pytest.raises(RuntimeError, match="no room"):
        system.on_event(CommandFailed(0.0, "StartMulticast", "no room", 2))


def test_a_plan_takes_its_rounds() -> None:
    plan = BinomialPipeline().plan(sources=1, destinations=1, blocks=3)
    assert planned_s(plan, [10, 20, 30], 10.0) == pytest.approx(6.0)


def test_links_of_other_hosts_are_not_guessed() -> None:
    assert link_rate("rdma") is None
    rate = link_rate("tcp", 1 << 24)
    assert rate is not None
    assert rate > 0


@pytest.mark.parametrize("link", [None, "12.5GB/s"])
def test_only_the_links_are_paced(model: PackedModel, monkeypatch: pytest.MonkeyPatch, link: str | None) -> None:
    """Sources load at the disk's own rate: at the desk's, 13.5 GB take 216 s before the first multicast."""
    clusters = []

    def start(config: LiveConfig, *, cluster: ClusterSpec, **_: object) -> None:
        clusters.append((cluster, config.paced))
        raise UserError("enough")

    monkeypatch.setattr(LiveConfig, "start", start)
    assert main(["multicast", "--model", str(model.directory), *([] if link is None else ["--link", link])]) == 2
    ((cluster, paced),) = clusters
    assert paced == (link is not None)
    assert min(cluster.ssd_bytes_per_s, cluster.pcie_bytes_per_s) >= 1e12
    assert cluster.nic_bytes_per_s == (1e12 if link is None else 12.5e9)


@pytest.mark.parametrize("wrong", [["--sources", "4"], ["--sources", "0"], ["--repeat", "0"]])
def test_mistakes_are_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["multicast", "--model", "tiny", *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["multicast", "--model", str(tmp_path)]) == 2
    assert "not a packed model" in capsys.readouterr().err
