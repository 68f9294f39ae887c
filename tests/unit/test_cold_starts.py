"""Whole cold starts: the constants, the processes of a run, what waits for them, and the table of ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lambdascale.control import build_system, drive
from lambdascale.core import ClusterSpec, MulticastPlan, ProcessStart, Send, TracedRequest, UserError
from lambdascale.core.commands import AllocateNode, Command, LoadBlocks, StartMulticast
from lambdascale.core.events import BlockArrived, Event, SetUpDone
from lambdascale.experiments.cold_starts import ratios
from lambdascale.experiments.compose import conf_dir
from lambdascale.experiments.pairs import INTERVALS
from lambdascale.figures.registry import render
from lambdascale.metrics import Recorder, requests_table
from lambdascale.metrics.tables import gpu_seconds, gpu_usage
from lambdascale.metrics.ttft_parts import PARTS
from lambdascale.sim import NewProcesses, SimConfig, TransferOptions, WarmPool
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.processes import PatientTransfers, Pool, Processes
from lambdascale.testing.systems import burst, small_cluster, small_model
from tests.property.test_ttft_parts_properties import check, system_of
from tests.unit.transfers_rig import CLUSTER

# Of a 1 GB model: 1 + 0.5 + max(2, 1 / 0.4) = 4 s.
START = ProcessStart(process_s=1.0, context_s=0.5, kernels_s=2.0, registration_bytes_per_s="0.4GB/s", first_iteration_s=0.25)
READY_S = 4.0


def cluster_of(nodes: int = 4) -> ClusterSpec:
    return replace(small_cluster(nodes), start=START)


def run(
    system: str,
    pool: Pool,
    requests: list[TracedRequest],
    *overrides: str,
    cluster: ClusterSpec | None = None,
    failures: tuple[tuple[int, float], ...] = (),
) -> Recorder:
    config = system_of(system, *overrides)
    cluster = cluster or cluster_of()
    backend = SimConfig(pool=pool, node_failures=failures).build(
        cluster=cluster, models=[small_model()], requests=requests, batching=config.batching, seed=0
    )
    recorder = Recorder()
    drive(build_system(config, cluster=cluster, models=[small_model()]), backend, [recorder])
    return recorder


def entries(recorder: Recorder, kind: type[Event | Command]) -> list[tuple[float, Any]]:
    return [(at, entry) for at, entry in recorder.entries if isinstance(entry, kind)]


class TestConstants:
    def test_kernels_beside_the_registration(self) -> None:
        assert START.ready_s(10**9) == pytest.approx(READY_S)
        assert START.ready_s(10**8) == pytest.approx(1.0 + 0.5 + 2.0)
        assert replace(START, registration_bytes_per_s=None).ready_s(10**10) == pytest.approx(1.0 + 0.5 + 2.0)

    @pytest.mark.parametrize(
        "wrong", [{"process_s": -1.0}, {"first_iteration_s": -0.1}, {"registration_bytes_per_s": 0.0}, {"kernels_s": "two"}]
    )
    def test_impossible_ones(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(START, **wrong)

    def test_a_cluster_without_them(self) -> None:
        with pytest.raises(UserError, match=r"small has no constants of process starts \(cluster.start\)"):
            run("lambdascale", NewProcesses(), burst(1), cluster=small_cluster(2))
        with pytest.raises(UserError, match="keep_alive_s must not be negative"):
            NewProcesses(keep_alive_s=-1.0)


class TestProcesses:
    def make(self, keep_alive_s: float = 10.0) -> Processes:
        return Processes(START, {"m": 10**9, "n": 10**8}, keep_alive_s)

    def test_an_allocation_starts_one(self) -> None:
        processes = self.make()
        processes.allocate(1.0, 0, "m", running=False)
        processes.allocate(1.0, 1, "m", running=True)
        processes.allocate(1.0, 0, "n", running=False)
        assert processes.ready_s("m", [0]) == 1.0 + READY_S
        assert processes.ready_s("m", [1]) == 1.0
        assert processes.ready_s("m", [0, 1]) == 1.0 + READY_S
        assert processes.ready_s("n", [0]) == 4.5
        assert [processes.first_use(node, "m") for node in (0, 0, 1)] == [True, False, False]

    @pytest.mark.parametrize(("again_s", "ready_s"), [(15.9, 15.9), (16.0, 20.0), (17.0, 21.0)])
    def test_it_outlives_a_release_for_a_while(self, again_s: float, ready_s: float) -> None:
        processes = self.make()
        processes.allocate(1.0, 0, "m", running=False)
        processes.first_use(0, "m")
        processes.release(6.0, 0, "m")
        processes.allocate(again_s, 0, "m", running=False)
        assert processes.ready_s("m", [0]) == ready_s
        assert processes.first_use(0, "m") is (ready_s > again_s)

    def test_one_that_is_not_up_yet_ends_with_the_release(self) -> None:
        processes = self.make()
        processes.allocate(1.0, 0, "m", running=False)
        processes.release(2.0, 0, "m")
        processes.allocate(3.0, 0, "m", running=False)
        assert processes.ready_s("m", [0]) == 3.0 + READY_S

    def test_a_lost_node_has_none(self) -> None:
        processes = self.make()
        for node in (0, 1):
            processes.allocate(1.0, node, "m", running=True)
            processes.release(2.0, node, "m")
        processes.lost(0)
        for node in (0, 1):
            processes.allocate(3.0, node, "m", running=False)
        assert (processes.ready_s("m", [0]), processes.ready_s("m", [1])) == (3.0 + READY_S, 3.0)


class TestRuns:
    @pytest.mark.parametrize(
        "system", ["lambdascale", "faasnet", "nccl_broadcast", "serverlessllm", "ideal", "lambdascale_prototype"]
    )
    def test_blocks_come_to_processes_that_run(self, system: str) -> None:
        """No block comes before, whatever brings it; GPU time counts from the allocation on."""
        recorder = run(system, NewProcesses(), burst(24, 1.0))
        began: dict[int, float] = {}
        late = 0
        for at, entry in recorder.entries:
            if isinstance(entry, AllocateNode) and at >= 1.0:
                began[entry.node] = at
            elif isinstance(entry, BlockArrived) and entry.node in began:
                assert at >= began[entry.node] + READY_S - 1e-9
                late += 1
        assert late >= 4
        rows = check(recorder)
        assert len(rows) == 24
        waited = [row for row in rows if row["setup_s"]]
        if system != "nccl_broadcast":
            assert all(row["setup_s"] == pytest.approx(READY_S) for row in waited if row["queue_s"] < 0.2)
        used = gpu_seconds(gpu_usage(recorder), recorder.end_s)
        assert used >= READY_S * len(began)

    def test_a_run_begins_with_processes(self) -> None:
        """The replica that a run begins with serves the first request at once."""
        recorder = run("lambdascale", NewProcesses(), burst(1, 1.0))
        (row,) = check(recorder)
        assert row["ttft_s"] < 0.1

    @pytest.mark.parametrize("system", ["lambdascale", "nccl_broadcast", "ideal"])
    def test_processes_of_no_cost_change_nothing(self, system: str) -> None:
        """Times are the same; only the events of their set-ups are more."""
        free = ProcessStart(process_s=0.0, context_s=0.0, kernels_s=0.0, registration_bytes_per_s=None, first_iteration_s=0.0)
        cluster = replace(small_cluster(4), start=free)
        tables = [
            requests_table(run(system, pool, burst(24, 1.0), cluster=cluster), "s") for pool in (WarmPool(), NewProcesses())
        ]
        warm, new = (table.to_pandas()[["ttft_s", "e2e_s", "restarts"]] for table in tables)
        pd.testing.assert_frame_equal(warm, new, atol=1e-6)

    def test_a_process_that_is_kept_for_ever_starts_once(self) -> None:
        waves = [*burst(12, 1.0), *burst(12, 40.0, 100)]
        recorder = run("faasnet", NewProcesses(keep_alive_s=None), waves, "system.memory.initial_copies=0")
        ups = [event.node for _, event in entries(recorder, SetUpDone)]
        assert ups
        assert len(ups) == len(set(ups)) < len([at for at, _ in entries(recorder, AllocateNode) if at >= 1.0])

    def test_the_first_iteration_takes_longer(self) -> None:
        """Replicas that load: the dispatch follows its last block at once."""
        firsts = {}
        for extra_s in (0.0, 0.25):
            cluster = replace(cluster_of(1), start=replace(START, first_iteration_s=extra_s))
            recorder = run("serverlessllm", NewProcesses(), burst(1), "system.autoscaler.min_replicas=0", cluster=cluster)
            ((_, load),) = entries(recorder, LoadBlocks)
            assert load.tier != "instant"
            (row,) = check(recorder)
            firsts[extra_s] = row["first_iteration_s"]
        assert firsts[0.25] - firsts[0.0] == pytest.approx(0.25)

    def test_a_node_that_dies_while_its_process_starts(self) -> None:
        """Deaths before anything can come to the node, and with the transfer of the others under way."""
        for system in ("lambdascale", "nccl_broadcast", "lambdascale_prototype"):
            recorder = run(system, NewProcesses(), burst(24, 1.0), failures=((2, 2.0), (1, 6.0)))
            assert len(check(recorder)) == 24


class TestTransfers:
    """Four nodes; a block takes a second on a link, and node 1 has a process from 5 s on."""

    def arrivals(self, plan: MulticastPlan, ends: Sequence[tuple[float, str]] = (), **command: Any) -> Any:
        kernel = Kernel()
        processes = Processes(START, {"m": 10**9}, 0.0)
        for node in plan.destinations:
            processes.allocate(1.0 if node == 1 else 0.0, node, "m", running=node != 1)
        found: dict[str, list[Any]] = {"blocks": [], "set up": []}
        engine = PatientTransfers(
            processes,
            kernel,
            CLUSTER,
            TransferOptions(communicator_setup=False),
            np.random.default_rng(0),
            lambda number, node, model, block: found["blocks"].append((round(kernel.now, 6), node, block)),
            lambda node, busy: None,
            set_up=lambda number, node: found["set up"].append((kernel.now, node)),
        )
        tiers = ("gpu",) * len(plan.sources)
        engine.multicast(StartMulticast(1, "m", plan, (50, 50), tiers, **({"multicast": "one_sided"} | command)))
        for at_s, what in ends:
            kernel.at(at_s, lambda _, what=what: engine.cancel(1) if what == "cancel" else engine.lost(1))
        while kernel.step():
            pass
        return found

    @pytest.mark.parametrize("command", [{}, {"barrier_s": 0.0}, {"multicast": "collective"}])
    def test_a_destination_that_is_not_up(self, command: dict[str, Any]) -> None:
        """The other one has its blocks meanwhile, unless the plan goes round by round, or needs all members from its start."""
        rounds = tuple((Send(0, 1, block), Send(2, 3, block)) for block in (0, 1))
        found = self.arrivals(MulticastPlan((0, 2, 1, 3), (0, 2), 2, rounds), **command)
        waits = 5.0 if command else 0.0
        assert sorted(found["blocks"]) == sorted([(6.0, 1, 0), (7.0, 1, 1), (waits + 1, 3, 0), (waits + 2, 3, 1)])
        told = {1, 3} if command else {1}
        assert sorted(found["set up"]) == [(5.0, node) for node in sorted(told)]

    def test_what_depends_on_it_waits_too(self) -> None:
        plan = MulticastPlan((0, 1, 2), (0,), 2, ((Send(0, 1, 0),), (Send(0, 1, 1), Send(1, 2, 0)), (Send(1, 2, 1),)))
        assert self.arrivals(plan)["blocks"] == [(6.0, 1, 0), (7.0, 1, 1), (7.0, 2, 0), (8.0, 2, 1)]

    @pytest.mark.parametrize("what", ["cancel", "lose"])
    def test_it_never_comes_up(self, what: str) -> None:
        rounds = tuple((Send(0, 1, block), Send(2, 3, block)) for block in (0, 1))
        found = self.arrivals(MulticastPlan((0, 2, 1, 3), (0, 2), 2, rounds), [(3.0, what)])
        assert found == {"blocks": [(1.0, 3, 0), (2.0, 3, 1)], "set up": []}


class TestRatios:
    def table(self) -> pd.DataFrame:
        rows = [
            {"pool": f"lambdascale.sim.{pool}", "kept_s": kept, "model": "m", "system": system, "seed": seed}
            | {"ttft_p90_s": p90 * seed, "gpu_seconds": 100.0 * p90, "backend": "sim"}
            | {f"{part}_mean_s": 0.1 for part in PARTS}
            | {
                f"{name}_{end}": None if system == "lambdascale" else p90 + at
                for name in ("p90", "gpu")
                for at, end in enumerate(("low", "high"))
            }
            for pool, kept, system, p90, seeds in (
                ("WarmPool", None, "lambdascale", 1.0, (1,)),
                ("WarmPool", None, "ideal", 0.5, (1, 3)),
                ("NewProcesses", 0.0, "lambdascale", 10.0, (1,)),
                ("NewProcesses", 0.0, "ideal", 9.0, (1, 3)),
            )
            for seed in seeds
        ]
        return pd.DataFrame(rows)

    def test_over_our_runs_with_the_same_pool(self) -> None:
        found = ratios(self.table())
        assert found.pool.tolist() == ["WarmPool", "WarmPool", "NewProcesses", "NewProcesses"]
        assert found.p90_ratio.tolist() == [1.0, 1.0, 1.0, 1.8]
        assert found.gpu_ratio.tolist() == [1.0, 0.5, 1.0, 0.9]
        for name in ("p90", "gpu"):
            ends = found[found.system == "ideal"][[f"{name}_low", f"{name}_high"]]
            assert ends.to_numpy().tolist() == [[0.5, 1.5], [9.0, 10.0]]
        assert found[found.system == "lambdascale"][list(INTERVALS)].isna().all(axis=None)

    def test_without_ours(self) -> None:
        table = self.table()
        with pytest.raises(UserError, match="no runs of lambdascale for m, NewProcesses"):
            ratios(table[(table.system != "lambdascale") | table.kept_s.isna()])

    def test_figure(self, tmp_path: Path) -> None:
        assert all(path.stat().st_size > 1000 for path in render("cold_starts", self.table(), tmp_path))
        with pytest.raises(UserError, match="pools are WarmPool, NewProcesses, not Other"):
            render("cold_starts", self.table().assign(pool="lambdascale.sim.Other"), tmp_path)
        with pytest.raises(UserError, match="no rows for m, new processes, ideal"):
            render("cold_starts", self.table().iloc[:-2], tmp_path)


def test_pools_of_conf() -> None:
    assert {path.stem for path in (conf_dir() / "pool").glob("*.yaml")} == {"warm", "none"}
