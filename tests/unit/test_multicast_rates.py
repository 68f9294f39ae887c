"""Timed multicasts: the system behind ``lambdascale multicast``, its limits, and mistakes of its users."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.faasnet import BalancedTree
from baselines.nccl_broadcast import Chain
from lambdascale.calibration.multicast_rates import link_rate, planned_s
from lambdascale.calibration.multicast_runs import Repeated, Trial
from lambdascale.checkpoints import PackedModel, pack
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.cli.main import main
from lambdascale.cli.multicast import Setting, run_trials
from lambdascale.core import ClusterSpec, MulticastPlan, Send, UserError
from lambdascale.core.commands import LoadBlocks, MulticastKind, ReleaseNode, SetTimer, StartMulticast
from lambdascale.core.events import BlockArrived, CommandFailed, NodeJoined, SetUpDone, TimerFired
from lambdascale.live.config import LiveConfig
from lambdascale.multicast import BinomialPipeline
from lambdascale.multicast.base import MulticastPlanner
from lambdascale.sim.measure import multicast_times
from lambdascale.sim.options import TransferOptions
from tests.unit.transfers_rig import CLUSTER


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    root = tmp_path_factory.mktemp("rates")
    (root / "source").mkdir()
    write_random(PRESETS["tiny"], root / "source", seed=0)
    pack(root / "source", root / "packed", 2)
    return PackedModel.open(root / "packed")


class Play:
    """Trials on nodes that all join at once; every command's blocks arrive when the test says so."""

    def __init__(self, model: PackedModel, trials: list[Trial], nodes: int, kind: MulticastKind = "one_sided") -> None:
        names = dict.fromkeys([name for trial in trials for name, _ in trial.plans], model)
        self.system = Repeated(names, trials, nodes, kind)
        joined = [self.system.on_event(NodeJoined(0.0, node)) for node in range(nodes)]
        assert not any(joined[:-1])
        self.commands = joined[-1]

    def arrive(self, places: list[tuple[int, str]], at: float) -> None:
        """Have both blocks arrive at nodes."""
        given = [self.system.on_event(BlockArrived(at, 0, node, name, block)) for node, name in places for block in range(2)]
        assert not any(given[:-1])
        self.commands = given[-1]

    def tick(self, at: float) -> None:
        self.commands = self.system.on_event(TimerFired(at, 1))

    def loads(self) -> list[tuple[int, str, str]]:
        return [(c.node, c.model, c.tier) for c in self.commands if isinstance(c, LoadBlocks)]

    def kinds(self) -> list[type]:
        return [type(command) for command in self.commands]


def test_two_multicasts_from_two_sources(model: PackedModel) -> None:
    plan = BinomialPipeline().plan(sources=2, destinations=2, blocks=2)
    play = Play(model, [Trial((("m", plan),), repeat=2)], 4)
    assert play.loads() == [(0, "m", "ssd"), (1, "m", "ssd")]
    play.arrive([(0, "m"), (1, "m")], 1.0)
    assert play.kinds() == [SetTimer]
    play.tick(2.0)
    (first,) = play.commands
    assert isinstance(first, StartMulticast)
    play.arrive([(2, "m"), (3, "m")], 2.5)
    assert play.commands == [ReleaseNode(2, "m", 1, False), ReleaseNode(3, "m", 1, False), SetTimer(1, 3.0)]
    play.tick(3.0)
    (second,) = play.commands
    assert isinstance(second, StartMulticast)
    assert second.transfer_id != first.transfer_id
    play.arrive([(2, "m"), (3, "m")], 3.25)
    assert not play.commands
    assert play.system.timed[0].seconds == [0.5, 0.25]


def test_a_destination_becomes_a_source(model: PackedModel) -> None:
    """The next trial's sources load what the last one's destinations have dropped."""
    one, two = (BinomialPipeline().plan(sources=k, destinations=3 - k, blocks=2) for k in (1, 2))
    play = Play(model, [Trial((("m", one),), repeat=1), Trial((("m", two),), repeat=1)], 3)
    assert play.loads() == [(0, "m", "ssd")]
    play.arrive([(0, "m")], 1.0)
    play.tick(1.5)
    play.arrive([(1, "m"), (2, "m")], 2.0)
    assert play.commands == [ReleaseNode(2, "m", 1, False), SetTimer(1, 2.5)], "node 1 keeps what it sends next"
    play.tick(2.5)
    play.arrive([(2, "m")], 2.75)
    assert [timed.seconds for timed in play.system.timed] == [[0.5], [0.25]]


def test_multicasts_of_several_models_begin_at_once(model: PackedModel) -> None:
    pair = BinomialPipeline().plan(sources=1, destinations=1, blocks=2)
    play = Play(model, [Trial((("a", pair.on((0, 2))), ("b", pair.on((1, 3)))), repeat=1)], 4)
    assert play.loads() == [(0, "a", "ssd"), (1, "b", "ssd")]
    play.arrive([(0, "a"), (1, "b")], 1.0)
    play.tick(1.5)
    assert [(c.model, c.plan.members) for c in play.commands if isinstance(c, StartMulticast)] == [("a", (0, 2)), ("b", (1, 3))]
    play.arrive([(2, "a")], 1.75)
    play.arrive([(3, "b")], 2.0)
    assert play.system.timed[0].seconds == [0.5]


def test_own_copies_are_made_once_and_loaded(model: PackedModel) -> None:
    plan = BinomialPipeline().plan(sources=1, destinations=2, blocks=2)
    play = Play(model, [Trial((("m", plan),), own_copies=True, repeat=2)], 3)
    assert play.loads() == [(1, "m", "ssd"), (2, "m", "ssd")]
    play.arrive([(1, "m"), (2, "m")], 1.0)
    assert play.commands == [ReleaseNode(1, "m", 1, True), ReleaseNode(2, "m", 1, True), SetTimer(1, 1.5)]
    for at in (1.5, 2.5):
        play.tick(at)
        assert play.loads() == [(1, "m", "host"), (2, "m", "host")]
        play.arrive([(1, "m"), (2, "m")], at + 0.25)
    assert play.system.timed[0].seconds == [0.25, 0.25]


def test_a_communicator_has_a_time_of_its_own(model: PackedModel) -> None:
    plan = Chain().plan(sources=1, destinations=1, blocks=2)
    play = Play(model, [Trial((("m", plan),), repeat=1)], 2, "collective")
    play.arrive([(0, "m")], 1.0)
    play.tick(1.5)
    (command,) = play.commands
    assert isinstance(command, StartMulticast)
    assert command.multicast == "collective"
    for node, at in enumerate((1.75, 2.0)):
        play.system.on_event(SetUpDone(at, command.transfer_id, node))
    play.arrive([(1, "m")], 2.25)
    assert (play.system.timed[0].seconds, play.system.timed[0].set_up_s) == ([0.75], [0.5])


def test_a_failure_ends_the_measurement(model: PackedModel) -> None:
    plan = BinomialPipeline().plan(sources=1, destinations=1, blocks=2)
    with pytest.raises(RuntimeError, match="no room"):
        Play(model, [Trial((("m", plan),))], 2).system.on_event(CommandFailed(0.0, "StartMulticast", "no room", 2))


def test_models_of_one_cluster_have_as_many_blocks(model: PackedModel, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_random(PRESETS["tiny"], tmp_path / "source", seed=0)
    pack(tmp_path / "source", tmp_path / "packed", 4)
    with pytest.raises(UserError, match=r"equally many blocks, not \[2, 4\]"):
        run_trials(Setting("lambdascale", 2, "shm", "cpu"), {"a": model, "b": PackedModel.open(tmp_path / "packed")}, [])


def test_a_plan_takes_its_sends() -> None:
    plan = BinomialPipeline().plan(sources=1, destinations=1, blocks=3)
    assert planned_s(plan, [10, 20, 30], 10.0) == pytest.approx(6.0)
    ring = Chain().plan(sources=1, destinations=3, blocks=3)
    assert planned_s(ring, [10, 20, 30], 10.0) == pytest.approx(6.0), "pieces are forwarded, not blocks"
    halves = MulticastPlan((0, 1, 2), (0, 1), 2, ((Send(0, 2, 0),), (Send(1, 2, 1),)))
    assert planned_s(halves, [10, 20], 10.0) == pytest.approx(3.0), "a receiver takes one block at a time"


@pytest.mark.parametrize("planner", [BinomialPipeline(), BalancedTree()])
@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 8))
def test_plans_take_what_they_take_simulated(
    planner: MulticastPlanner, sizes: list[int], sources: int, destinations: int
) -> None:
    """Rounds have no barrier between them: blocks of unequal sizes take less than the largest of each round."""
    plan = planner.plan(sources=sources, destinations=destinations, blocks=len(sizes))
    found = multicast_times(plan, sizes, replace(CLUSTER, nodes=12, rdma_efficiency=1.0), TransferOptions()).total_s
    assert planned_s(plan, sizes, 100.0) == pytest.approx(found)


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


@pytest.mark.parametrize("verify", ["full", "sampled", "off"])
def test_nodes_verify_what_the_command_says(model: PackedModel, monkeypatch: pytest.MonkeyPatch, verify: str) -> None:
    configs = []

    def start(config: LiveConfig, **_: object) -> None:
        configs.append(config)
        raise UserError("enough")

    monkeypatch.setattr(LiveConfig, "start", start)
    assert main(["multicast", "--model", str(model.directory), *([] if verify == "full" else ["--verify", verify])]) == 2
    assert [config.verify for config in configs] == [verify]


@pytest.mark.parametrize("wrong", [["--sources", "4"], ["--sources", "0"], ["--repeat", "0"]])
def test_mistakes_are_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["multicast", "--model", "tiny", *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["multicast", "--model", str(tmp_path)]) == 2
    assert "not a packed model" in capsys.readouterr().err
