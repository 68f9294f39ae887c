"""Times of single tokens in simulation: derived from iterations, and the same as if each step were an event."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from lambdascale.cli.main import main
from lambdascale.control.batching import BatchedRequest, BatchLimits, BatchScheduler, Iteration
from lambdascale.core.commands import Dispatch, KvPolicy, Repartition, SwitchMode
from lambdascale.core.events import NodeLost, RequestPreempted
from lambdascale.core.token_gaps import TokenGaps
from lambdascale.experiments.build import build
from lambdascale.experiments.collect import ROWS
from lambdascale.experiments.compose import compose
from lambdascale.experiments.runner import drive_experiment, run
from lambdascale.metrics import Recorder, events_table, requests_table, summarise, tables
from lambdascale.sim import timed_instances
from lambdascale.sim.timed_instances import _TimedScheduler
from lambdascale.sim.token_log import BatchLog, Stay, TokenLog
from tests.unit import test_sim_instances as rig

BURST = ["workload=burst", "workload.count=60", "workload.output_tokens=200", "cluster.nodes=6", "cluster.nic_bytes_per_s=3GB/s"]
BURSTY = ["workload=bursty", "workload.duration_s=120", "cluster.nodes=6"]
SCENES = {
    "one replica": ["workload=constant", "workload.rate_rps=3", "workload.duration_s=30", "cluster.nodes=1", "system=ideal"],
    "multicasts": BURSTY,
    "mode switches": BURST,
    "mode switches, KV copied": [*BURST, "system.kv=copy"],
    "mode switches, node by node": [*BURST, "system.kv=copy", "+system.start.pipelines.switch=each"],
    "the prototype's batches": [*BURSTY, "system=lambdascale_prototype"],
    "several GPUs": ["workload=burst", "workload.count=60", "model=llama2_70b", "cluster=testbed2"],
    "KV memory runs out": [
        "workload=burst",
        "workload.count=24",
        "workload.lengths=azure",
        "cluster.nodes=1",
        "cluster.gpu.memory_bytes=32GB",
    ],
    "nodes die": [
        "workload=burst",
        "workload.count=60",
        "workload.output_tokens=300",
        "cluster.nodes=6",
        "backend.node_failures=[[0,3.0],[2,4.5]]",
    ],
    "shared cores": ["model=smollm2", "cluster=measured/two_cores", "workload=burst", "workload.count=30", "workload.spread_s=3"],
}


def driven(overrides: list[str]) -> tuple[Recorder, TokenGaps | None]:
    experiment = build(compose(overrides))
    requests = experiment.workload.requests(models=[model.name for model in experiment.models], seed=1)
    recorder = Recorder()
    return recorder, drive_experiment(experiment, requests, 1, recorder).token_gaps


def simulated(overrides: list[str]) -> tuple[Recorder, pd.DataFrame, TokenGaps]:
    recorder, gaps = driven([*overrides, "token_times=true"])
    assert gaps is not None
    return recorder, requests_table(recorder, "s", gaps=gaps).to_pandas(), gaps


@pytest.mark.parametrize("scene", SCENES)
def test_gaps_lead_from_the_first_token_to_the_last(scene: str) -> None:
    """An answer has one gap less than tokens, none below 0, and their sum is the time between the two events."""
    recorder, rows, found = simulated(SCENES[scene])
    gaps = found.by_request()
    ok = rows[rows.status == "ok"]
    assert set(gaps) == set(ok.request_id)
    for row in ok.to_dict("records"):
        own = gaps[row["request_id"]]
        assert len(own) == row["output_tokens"] - 1
        assert (own >= -1e-9).all()
        assert own.sum() == pytest.approx(row["finished_s"] - row["first_token_s"], abs=1e-6)
        assert row["stall_s"] == (pytest.approx(own.max()) if len(own) else pytest.approx(np.nan, nan_ok=True))
    kinds = {type(entry) for _, entry in recorder.entries}
    assert (RequestPreempted in kinds) == (scene == "KV memory runs out")
    assert (NodeLost in kinds) == (scene == "nodes die")
    moved = any(entry.moves for _, entry in recorder.entries if isinstance(entry, SwitchMode))
    assert moved or "switches" not in scene


@pytest.mark.parametrize("scene", ["one replica", "multicasts", "shared cores"])
def test_merged_steps_have_their_own_times(scene: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator merges decode steps; without that, each step has an event of its own, and the gaps are the same."""
    merged = simulated(SCENES[scene])[2].by_request()
    schedule = BatchScheduler.schedule

    def step_by_step(self: BatchScheduler) -> Iteration | None:
        iteration = schedule(self)
        if iteration is not None:
            iteration.max_steps = 1
        return iteration

    monkeypatch.setattr(BatchScheduler, "schedule", step_by_step)
    single = simulated(SCENES[scene])[2].by_request()
    assert set(single) == set(merged)
    for number, own in single.items():
        assert merged[number] == pytest.approx(own, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("kv", "moved_s"), [("recompute", 0.1), ("copy", 0.02)])
def test_moved_boundaries(kv: KvPolicy, moved_s: float) -> None:
    """All blocks go to another node after four tokens: the fifth waits for a prefill, or for its KV, and the others do not."""
    cluster = rig.backend(token_times=True)
    rig.serve(cluster, 1, 0, 1)
    cluster.submit(Dispatch(1, (rig.request(0, 11),)))
    rig.later(cluster, 0.15, Repartition(1, rig.stages(2), kv, rig.KV))
    rig.play(cluster)
    gaps = cluster.token_gaps()
    assert gaps is not None
    assert gaps.by_request()[0] == pytest.approx([0.02] * 3 + [moved_s] + [0.02] * 6, abs=0.004)
    assert gaps.longest()[0] == gaps.seconds[3] > 0.02


def test_steps_of_a_run_that_a_death_ends_early() -> None:
    """Tokens that the client had by then have the times of the lost run; the rest comes from the instance that starts anew."""
    cluster = rig.backend(failures=((0, 0.17),), token_times=True)
    rig.serve(cluster, 1, 0)
    rig.serve(cluster, 2, 1)
    cluster.submit(Dispatch(1, (rig.request(0, 6),)))
    rig.later(cluster, 0.5, Dispatch(2, (rig.request(0, 6),)))
    rig.play(cluster)
    gaps = cluster.token_gaps()
    assert gaps is not None
    # Tokens at 0.1, 0.12, 0.14 and 0.16; the fifth of the other instance at 0.5 + 0.1 + 4 * 0.02.
    assert gaps.seconds == pytest.approx([0.02, 0.02, 0.02, 0.52, 0.02])


@pytest.mark.parametrize(
    ("limits", "kv_tokens", "second", "gaps"),
    [
        # The first has 13 tokens. The second has five when memory runs out, and its sixth and last comes with the second prefill.
        (BatchLimits(max_batch=2), 17, (4, 6), [1.0] * 4 + [9.0]),
        # The second's prompt is being prefilled, two tokens beside one of the first's, when memory runs out.
        (BatchLimits(max_batch=2, max_tokens=3), 40, (36, 3), [1.0] * 2),
    ],
)
def test_preempted_requests(limits: BatchLimits, kv_tokens: int, second: tuple[int, int], gaps: list[float]) -> None:
    """Every iteration takes a second."""
    batch: Any = SimpleNamespace(kernel=SimpleNamespace(now=0.0), began_s=0.0, steps=1)
    tokens = TokenLog()
    scheduler = _TimedScheduler(limits, kv_tokens, tokens, batch)
    scheduler.add(BatchedRequest(0, 4, 13 if kv_tokens == 17 else 20))
    scheduler.add(BatchedRequest(1, *second))
    while (iteration := scheduler.schedule()) is not None:
        batch.began_s = batch.kernel.now
        batch.kernel.now += 1.0
        scheduler.complete(iteration)
    assert scheduler.preemptions == 1
    found = tokens.gaps().by_request()
    assert found[0].tolist() == [1.0] * len(found[0])
    assert found[1].tolist() == gaps


def answered(logs: list[BatchLog], *stays: Stay) -> list[float]:
    """Gaps of a request with these stays, in the batches of ``logs`` by number."""
    tokens = TokenLog()
    assert [tokens.open(log) for log in logs] == [*range(len(logs))]
    for stay in stays[:-1]:
        tokens.stay(1, stay)
    last = stays[-1]
    tokens.ended += (1, last.batch, last.joined, last.left, last.produced)
    if last.alone_s is not None:
        tokens.alone_s[1] = last.alone_s
    return tokens.gaps().by_request()[1].tolist()


@pytest.mark.parametrize(("tokens", "gaps"), [(1, []), (2, [1.0]), (3, [1.0, 1.5])])
def test_short_answers_from_the_first_step_on(tokens: int, gaps: list[float]) -> None:
    log: BatchLog = [0, 2.0, 0.0, 0.0, 1, 3.0, 2.0, 0.0, 2, 4.5, 3.0, 0.0, 3, 5.0, 4.5, 0.0]
    assert answered([log], Stay(0, 0, tokens - 1, tokens, 2.0 if tokens == 1 else None)) == gaps


def test_steps_run_as_one_grow_evenly() -> None:
    """Three steps of 1.0, 1.1 and 1.2 s, after one of 0.5 s beside a prefill."""
    log: BatchLog = [0, 2.0, 0.0, 0.0, 1, 2.5, 2.0, 0.0, 4, 5.8, 2.5, 0.1]
    assert answered([log], Stay(0, 0, 4, 5)) == pytest.approx([0.5, 1.0, 1.1, 1.2])
    assert answered([log], Stay(0, 1, 4, 4)) == pytest.approx([1.0, 1.1, 1.2])


def test_a_run_of_steps_that_had_to_wait() -> None:
    """A batch is idle for 2 s, or waits for its node: the first of two steps of 1 s follows on the token before 3 s later."""
    log: BatchLog = [0, 2.0, 0.0, 0.0, 2, 6.0, 4.0, 0.0]
    assert answered([[], log], Stay(1, 0, 2, 3)) == [3.0, 1.0]


FIRST: BatchLog = [0, 1.0, 0.0, 0.0, 1, 2.0, 1.0, 0.0]
SECOND: BatchLog = [0, 5.0, 4.0, 0.0, 1, 6.0, 5.0, 0.0, 1, 8.0, 6.0, 0.0]


@pytest.mark.parametrize(
    ("second", "gaps"),
    [
        (Stay(1, 0, 1, 3), [1.0, 4.0]),  # its KV was copied
        (Stay(1, 0, 1, 4), [1.0, 3.0, 1.0]),  # a prefill anew, which gives a token
        (Stay(1, -1, 0, 3, 5.0), [1.0, 3.0]),  # that was the last
    ],
)
def test_several_stays(second: Stay, gaps: list[float]) -> None:
    assert answered([FIRST, SECOND], Stay(0, 0, 1, 2), second) == gaps


def test_a_token_that_comes_again_counts_when_it_first_came() -> None:
    """The answer begins anew after a loss: what the client had is not new to it."""
    lost: BatchLog = [0, 1.0, 0.0, 0.0, 2, 3.0, 1.0, 0.0]
    other: BatchLog = [0, 10.0, 9.0, 0.0, 3, 13.0, 10.0, 0.0]
    assert answered([lost, other], Stay(0, 0, 2, 3), Stay(1, 0, 3, 4)) == [1.0, 1.0, 10.0]


def test_several_stays_without_a_decode_step() -> None:
    first: BatchLog = [0, 1.0, 0.0, 0.0]
    second: BatchLog = [0, 4.0, 3.0, 0.0]
    assert answered([first, second], Stay(0, -1, 0, 1, 1.0), Stay(1, -1, 0, 2, 4.0)) == [3.0]


def test_the_last_end_of_a_request_counts() -> None:
    """One that ended on a lost node, too late to count, ends again elsewhere."""
    tokens = TokenLog()
    for log in (FIRST, SECOND):
        tokens.open(log)
    tokens.ended += (4, 1, 0, 1, 2, 1, 0, 0, 1, 2, 4, 0, 0, 1, 2)
    assert {number: gaps.tolist() for number, gaps in tokens.gaps().by_request().items()} == {1: [1.0], 4: [1.0]}
    tokens.ended += (4, 1, 0, 0, 1)
    assert tokens.gaps().lengths.tolist() == [1, 0]


def test_the_longest_gap_of_answers_that_overlap_in_any_order() -> None:
    """Two share gaps up to the end of all; what lies between two requests counts for neither."""
    gaps = TokenGaps(np.array([1, 2, 3, 4]), np.array([4, 3, 9, 0]), np.array([2, 3, 0, 1]), np.array([1.0, 9, 9, 2, 4, 3]))
    assert gaps.longest().tolist()[:2] + gaps.longest().tolist()[3:] == [4.0, 4.0, 1.0]
    assert np.isnan(gaps.longest()[2])
    assert gaps.seconds.tolist() == [4.0, 3, 2, 4, 3, 1]
    some = gaps.of_requests(np.array([2, 4]))
    assert (some.request_ids.tolist(), some.seconds.tolist()) == ([2, 4], [2.0, 4, 3, 1])


def test_summary_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, rows, gaps = simulated(SCENES["one replica"])
    table = requests_table(recorder, "s", gaps=gaps)
    found = summarise(recorder, table, system="s", backend="sim", usd_per_gpu_hour=1, wall_s=0, gaps=gaps)
    assert found["itl_s"]["max"] == gaps.seconds.max() == rows.stall_s.max()
    assert found["itl_s"]["p99"] == pytest.approx(np.percentile(gaps.seconds, 99))
    own = gaps.by_request()[0]
    assert rows.itl_s.iloc[0] == pytest.approx(own, abs=1e-6)
    monkeypatch.setattr(tables, "MANY_GAPS", len(gaps.seconds) - 1)
    rounded = requests_table(recorder, "s", gaps=gaps)
    assert rounded["itl_s"][0].as_py() == pytest.approx(own.round(3).tolist(), abs=1e-6)
    assert rounded["stall_s"] == table["stall_s"]


def test_requests_without_an_answer_have_no_gaps() -> None:
    """An answer that ended too late to count has none either; one of a single token has none, which is known."""
    gaps = TokenGaps.of({4: [0.5, 0.25], 2: [], 3: [9.0]})
    table = pa.table({"request_id": [1, 2, 3, 4], "status": ["failed", "ok", "failed", "ok"]})
    lists, stalls = tables._gap_columns(table, gaps)
    assert lists.to_pylist() == [None, [], None, [0.5, 0.25]]
    assert stalls.to_pylist() == [None, None, None, 0.5]
    assert tables.answered(table, gaps).by_request()[4].tolist() == [0.5, 0.25]


@pytest.mark.parametrize("scene", SCENES)
def test_what_is_not_asked_for_costs_nothing_and_changes_nothing(scene: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event log, all other columns and the summary are the same with the setting and without, byte by byte."""
    recorder, _, gaps = simulated(SCENES[scene])
    monkeypatch.setattr(timed_instances._TimedScheduler, "complete", None)  # never called
    other, without = driven(SCENES[scene])
    assert without is None
    assert events_table(other).equals(events_table(recorder))
    plain, timed = requests_table(other, "s"), requests_table(recorder, "s", gaps=gaps)
    assert plain.schema == timed.schema
    assert plain.drop_columns(["itl_s", "stall_s"]).equals(timed.drop_columns(["itl_s", "stall_s"]))
    assert plain["itl_s"].null_count == plain["stall_s"].null_count == plain.num_rows

    def summary(record: Recorder, table: pa.Table, found: TokenGaps | None) -> dict[str, Any]:
        return summarise(record, table, system="s", backend="sim", usd_per_gpu_hour=1, wall_s=0, gaps=found)

    assert summary(other, plain, None) == {k: v for k, v in summary(recorder, timed, gaps).items() if k != "itl_s"}


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ([], False),
        (["token_times=true"], True),
        (["backend=live"], True),
        (["backend=live", "token_times=true"], True),
        (["backend=live", "token_times=false"], False),
    ],
)
def test_the_setting(overrides: list[str], kept: bool) -> None:
    """Live runs keep token times by default, and simulations do not."""
    assert build(compose(overrides)).token_times == kept


def test_a_run_and_its_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The setting reaches the folder of a run, the tables of studies and what other harnesses read."""
    done = run(compose(["workload=burst", "workload.count=6", "token_times=true", f"out={tmp_path / 'run'}"]))
    found = done.summary["itl_s"]
    row = ROWS["summary"](done.folder).iloc[0]
    assert (row.itl_p99_s, row.itl_max_s) == (found["p99"], found["max"])
    assert main(["export", str(done.folder), "--format", "vllm-bench"]) == 0
    out, error = capsys.readouterr()
    document = json.loads(out)
    assert [len(gaps) for gaps in document["itls"]] == [tokens - 1 for tokens in document["output_lens"]]
    assert document["p99_itl_ms"] == pytest.approx(1e3 * found["p99"], rel=1e-6)
    assert error == ""
