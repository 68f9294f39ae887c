"""Pairs of runs, conclusions under other assumptions, and the text whose numbers come from tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from lambdascale.core import UserError
from lambdascale.experiments import paper_table, paper_text
from lambdascale.experiments.beliefs import LINES, Tables, render
from lambdascale.experiments.collect import study_table
from lambdascale.experiments.compose import compose, conf_dir
from lambdascale.experiments.pairs import INTERVALS, run_rows
from lambdascale.experiments.runner import run
from lambdascale.experiments.sensitivity import conclusions, flips, markdown, verdict
from lambdascale.experiments.study import Study, study_of
from lambdascale.metrics.intervals import paired

TABLES = conf_dir().parent / "results" / "tables"


# -- pairs of runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a run with overrides, made once for all tests: they only read it."""
    small = ["experiment=quickstart", "workload.duration_s=240", f"results={tmp_path_factory.mktemp('results')}"]

    @cache
    def made(*overrides: str) -> Path:
        return run(compose([*small, *overrides])).folder

    return made


STUDY = Study(rows="pairs", reference="lambdascale", columns={"compression": "workload.time_compression"}, grids=({"seed": 1},))


def test_each_system_is_paired_with_the_references_run_of_its_seed_and_columns(folder: Callable[..., Path]) -> None:
    systems = ("lambdascale", "serverlessllm")
    runs = [folder(f"system={system}", f"seed={seed}") for system in systems for seed in (1, 2)]
    runs += [folder(f"system={system}", "workload.time_compression=1") for system in systems]
    table = study_table(STUDY, runs).set_index("compression")
    assert table.system.tolist() == ["serverlessllm"] * 2
    assert table.traces.to_dict() == {3.0: 2, 1.0: 1}
    assert table.block_s.isna().to_dict() == {3.0: True, 1.0: False}, "several traces have no blocks"
    summary = [pd.read_json(path / "summary.json", typ="series") for path in runs]
    p90 = [one.ttft_s["p90"] for one in summary]
    assert table.p90_ratio[1.0] == pytest.approx(p90[5] / p90[4])
    assert table.p90_ratio[3.0] == pytest.approx((p90[2] / p90[0] + p90[3] / p90[1]) / 2)
    assert table.gpu_ratio[1.0] == pytest.approx(summary[5].gpu_seconds / summary[4].gpu_seconds), "the integral is the summary's"


@pytest.mark.parametrize(
    ("kept", "block_s"),
    [
        ([], 15.0),
        (["system.memory.keep_alive_s=0"], 15.0),
        (["system.memory.keep_alive_s=null"], 15.0),
        (["system.memory.keep_alive_s=40"], 40.0),
        (["system.autoscaler.keep_alive_s=20"], 20.0),
        (["pool@backend.pool=none", "backend.pool.keep_alive_s=60", "system.memory.keep_alive_s=40"], 60.0),
    ],
)
def test_blocks_are_as_long_as_the_longest_keep_alive_of_either_system(
    folder: Callable[..., Path], kept: list[str], block_s: float
) -> None:
    runs = [folder("system=lambdascale", *kept), folder("system=ideal", *kept)]
    other = folder("system=ideal")
    own = paired([(run_rows(runs[0]), run_rows(runs[1]))], memory_s=block_s)
    row = study_table(STUDY, runs).iloc[0]
    assert (row.block_s, row.blocks) == (block_s, own.blocks)
    assert (row.p90_low, row.gpu_high) == pytest.approx((own.p90.low, own.gpu.high), nan_ok=True)
    mixed = study_table(STUDY, [runs[0], other]).iloc[0]
    assert mixed.block_s == block_s, "that of one of the two counts"


def test_a_system_may_have_a_reference_of_its_own(folder: Callable[..., Path]) -> None:
    study = replace(STUDY, references={"ideal_prototype": "lambdascale_prototype"})
    systems = ("lambdascale", "ideal", "lambdascale_prototype", "ideal_prototype")
    runs = {system: folder(f"system={system}") for system in systems}
    table = study_table(study, list(runs.values())).set_index("system")
    wanted = {"ideal": "lambdascale", "lambdascale_prototype": "lambdascale", "ideal_prototype": "lambdascale_prototype"}
    assert table.reference.to_dict() == wanted
    seconds = {system: pd.read_json(path / "summary.json", typ="series").gpu_seconds for system, path in runs.items()}
    for system, reference in wanted.items():
        assert table.gpu_ratio[system] == pytest.approx(seconds[system] / seconds[reference])
    with pytest.raises(UserError, match="no run of lambdascale_prototype to compare with: ideal_prototype"):
        study_table(study, [runs["lambdascale"], runs["ideal_prototype"]])


@pytest.mark.parametrize("rows", ["outcome", "parts"])
def test_single_runs_have_the_intervals_of_their_pairs_beside_them(folder: Callable[..., Path], rows: str) -> None:
    """Mutation: the interval of another system, or of another value of a column, or none where a column is empty."""
    runs = [folder(f"system={system}", f"workload.time_compression={c}") for system in ("lambdascale", "ideal") for c in (1, 3)]
    pairs = study_table(STUDY, runs).set_index("compression")
    columns = {"compression": "workload.time_compression", "pool": "backend.pool._target_", "kept_s": "backend.pool.keep_alive_s"}
    table = study_table(replace(STUDY, rows=rows, columns=columns), runs).set_index(["system", "compression"])
    for compression in (1, 3):
        own = table.loc[("ideal", compression)]
        for column in INTERVALS:
            assert own[column] == pytest.approx(pairs[column][compression], nan_ok=True)
            assert math.isnan(table.loc[("lambdascale", compression)][column]), "the reference has none"
    assert pairs.p90_low.notna().any()


def test_rows_name_set_ups_that_were_not_measured(tmp_path: Path) -> None:
    """Mutations: the set-up of another run, or none; of pairs, the reference's alone."""
    burst = ["workload=burst", "workload.count=60", "system.autoscaler.target_per_replica=1", "system.memory.initial_copies=0"]
    settings = [*burst, "workload.time_compression=1", f"results={tmp_path}"]
    systems = ("lambdascale", "nccl_broadcast", "faasnet")
    folders = [run(compose([*settings, f"system={name}", "cluster.nodes=9"])).folder for name in systems]
    single = study_table(Study(rows="summary", fields=("gpu_seconds",)), folders).set_index("system").setup
    assert single.to_dict() == {"lambdascale": "", "nccl_broadcast": "up to 9 ranks: one sample", "faasnet": ""}
    pairs = study_table(STUDY, folders).set_index("system").setup
    assert pairs.to_dict() == {"nccl_broadcast": "up to 9 ranks: one sample", "faasnet": ""}


def test_a_system_without_its_reference_is_an_error(folder: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="no run of lambdascale to compare with: ideal"):
        study_table(STUDY, [folder("system=ideal")])
    runs = [folder("system=lambdascale", f"seed={seed}") for seed in (1, 2)]
    with pytest.raises(UserError, match="seed 3"):
        study_table(STUDY, [*runs, folder("system=ideal", "seed=3")])


@pytest.mark.parametrize("broken", ["{grids: [{seed: 1}], rows: pairs}", "{grids: [{seed: 1}], rows: summary, reference: x}"])
def test_pairs_need_a_reference_and_nothing_else_has_one(broken: str) -> None:
    with pytest.raises(UserError, match="needs a reference"):
        study_of(compose([f"study={broken}"]), "broken")


# -- sensitivity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "value", "low", "high", "found"),
    [
        (3.0, 2.5, 2.2, 2.8, "holds"),
        (3.0, 1.9, 1.5, 2.2, "halved"),
        (3.0, 1.2, 0.9, 1.5, "undecided"),
        (3.0, 0.9, 0.8, 1.1, "undecided"),
        (3.0, 0.7, 0.6, 0.9, "reversed"),
        (3.0, 0.7, math.nan, math.nan, "undecided"),
        (3.0, 2.5, math.nan, math.nan, "holds"),
        (0.5, 0.6, 0.55, 0.65, "holds"),
        (0.5, 1.5, 1.2, 1.8, "reversed"),
    ],
)
def test_the_fate_of_a_conclusion(base: float, value: float, low: float, high: float, found: str) -> None:
    assert verdict(base, value, low, high, none=1.0) == found
    assert verdict(base - 1, value - 1, low - 1, high - 1, none=0.0) == found


def row(name: str, p90: float, gpu: float, spread: float = 0.01) -> dict[str, object]:
    numbers = {"p90_ratio": p90, "p90_low": p90 - spread, "p90_high": p90 + spread}
    numbers |= {"gpu_ratio": gpu, "gpu_low": gpu - spread, "gpu_high": gpu + spread}
    return {"run": f"sensitivity/{name}", "model": "m", "system": "faasnet", "backend": "sim", **numbers}


def test_conclusions_and_flips() -> None:
    table = pd.DataFrame(
        [row("base/0", 3.0, 1.25), row("link/100Gb/s", 2.0, 1.25), row("ssd/2", 2.9, 0.8), row("ssd/9", 1.2, 1.05)]
    )
    found = conclusions(table)
    assert found[found.conclusion == "GPU time below FaaSNet"].result.round(2).tolist() == [20.0, -25.0, 4.76]
    assert set(found.base.round(2)) == {3.0, 20.0}
    lost = flips(table).set_index(["conclusion", "setting", "value"])
    assert lost.verdict.to_dict() == {
        ("P90 TTFT, FaaSNet over λScale", "link", "100Gb/s"): "holds",
        ("P90 TTFT, FaaSNet over λScale", "ssd", "9"): "halved",
        ("GPU time below FaaSNet", "ssd", "2"): "reversed",
        ("GPU time below FaaSNet", "ssd", "9"): "halved",
    }
    assert lost.paper.tolist()[:2] == ["in to below", "in to below"]
    smallest, largest = "1.2 x (1.19 to 1.21): ssd = 9", "2.9 x (2.89 to 2.91): ssd = 2"
    assert f"| 3 x (2.99 to 3.01) | {smallest} | {largest} | none | ssd = 9 |" in markdown(table)
    unsure = table.assign(p90_low=math.nan, p90_high=math.nan)
    assert "| 3 x | 1.2 x: ssd = 9 | 2.9 x: ssd = 2 |" in markdown(unsure)


def test_conclusions_need_a_base_and_names() -> None:
    with pytest.raises(UserError, match="no rows of base"):
        conclusions(pd.DataFrame([row("ssd/9", 1.2, 1.05)]))
    with pytest.raises(UserError, match="SETTING/VALUE"):
        conclusions(pd.DataFrame([row("base", 1.2, 1.05)]))
    other = pd.DataFrame([row("base/0", 1.2, 1.05), row("ssd/9", 1.2, 1.05) | {"system": "mine"}])
    with pytest.raises(UserError, match="no row of base for mine"):
        conclusions(other)


# -- the text ------------------------------------------------------------------------------------------------------------

NUMBERS = {"t": pd.DataFrame({"key": ["a", "b"], "k": [1, 2], "value": [1.23456, 9.0]})}


def test_numbers_come_from_tables() -> None:
    assert render("7B: {{ cell('t', 'value', key='a') }} at 95 %\n", NUMBERS) == "7B: 1.23 at 95 %\n"
    assert render("{{ cell('t', 'key', k=2) }}", NUMBERS) == "b\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("faster by 1.9 times", "in no table: 1.9"),
        ("{{ cell('t', 'value', key='c') }}", "0 rows of t"),
        ("{{ cell('t', 'value') }}", "2 rows of t"),
        ("{{ cell('t', 'value', colour='a') }}", "no column colour"),
        ("{{ nothing }}", "nothing"),
        ("a line\n" * (LINES + 1), "26 lines"),
    ],
)
def test_a_text_that_says_more_than_the_tables(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        render(template, NUMBERS)


@pytest.mark.parametrize("measured", ["", math.nan])
def test_set_ups_that_were_not_measured_are_marked(measured: object) -> None:
    """The README's text and the table of the page have the mark row by row, and explain it only where it is used."""
    setups = pd.DataFrame({"model": ["a", "b"], "setup": [measured, "up to 12 ranks: one sample"]})
    mine = {"what": "P90 TTFT, NCCL over λScale", "ours": 2.0, "paper": "3", "interval": "1 to 3", "error": "-33 %"}
    columns = ("figure", "range_over_seeds", "unit", "why", "without", "interval_without", "error_without", "closest", "verdict")
    tables = {"paper_vs_ours": setups.assign(**mine, **dict.fromkeys(columns, ""))}
    text = "{{ mark('nccl_broadcast', 'a') }}|{{ mark('nccl_broadcast', 'b') }}|{{ mark('nccl_broadcast', 'a', 'b') }}"
    assert render(text, tables) == "|†|†\n"
    both = paper_text.markdown(tables["paper_vs_ours"])
    assert ("| a | 3 | 2.0 |" in both, "| b | 3 | 2.0† |" in both, "\n†: NCCL's set-up" in both) == (True, True, True)
    assert "†" not in paper_text.markdown(tables["paper_vs_ours"].iloc[:1])


def test_the_largest_communicator_of_a_system_is_named() -> None:
    """Mutations: the first, or the smallest, or that of the text's order."""
    ranks = ("up to 9 ranks: one sample", "up to 16 ranks: extrapolated", "up to 10 ranks: one sample")
    assert paper_table._setup(pd.DataFrame({"setup": [None, *ranks, ""]})) == ranks[1]
    assert paper_table._setup(pd.DataFrame({"setup": [None, ""]})) == ""


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no table t\.csv"):
        render("{{ cell('t', 'value', key='a') }}", Tables(tmp_path))
