"""Figures 8 to 11 live on GPUs: the order of runs, their tables, the simulator's errors, the figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from lambdascale.calibration import random_models
from lambdascale.checkpoints import PackedModel
from lambdascale.core import UserError
from lambdascale.core.events import NodeJoined, NodeLost
from lambdascale.experiments.gpu_figures import Outcome, Pair, Tables, curves, errors, orders, pairs, simulated, with_ramps
from lambdascale.experiments.gpu_runs import BURST_AT_S, DisturbedRunError, FigureRun, Site, check_undisturbed, network
from lambdascale.figures import gpu_live
from lambdascale.figures.registry import FIGURES, figures_in, load_table, render
from lambdascale.metrics.over_time import reached_s, token_rates

BASE = FigureRun(
    **{"kind": "trace", "model": "7B", "system": "lambdascale", "sources": 1, "seed": 1, "profile": "h200"},
    **{"link": "400Gb/s", "pcie": "26GB/s", "ssd": "5GB/s", "arrivals": "authors", "start_s": 0.0, "length_s": 30.0},
    **{"compression": 18.0, "count": 40, "prompt_tokens": 128, "output_tokens": 64, "host_copies": True},
)
BURST = replace(BASE, kind="burst", arrivals="burst", length_s=0.0, compression=1.0, host_copies=False)
SYSTEMS = ("lambdascale", "ideal")


def arrivals(count: int) -> pd.DataFrame:
    return pd.DataFrame({"request_id": range(count), "arrival_s": 1.0})


def outcome(run: FigureRun, count: int) -> Outcome:
    return simulated(run, arrivals(count), nodes=4, blocks=16)[0]


def tables(folder: Path, runs: list[FigureRun], machine: str = "4 x H200") -> Tables:
    """Tables of runs whose live values are the simulator's own."""
    made = Tables(folder)
    for run in runs:
        found, number = outcome(run, 40), made.next_run
        row = {"run": number, **run.row(), **found.measures, "nodes": 4, "blocks": 16, "measured_on": machine}
        made.add(pd.DataFrame([row]), found.requests.assign(run=number), found.gpus.assign(run=number))
    return made


def test_the_most_valuable_runs_come_first() -> None:
    found = list(orders(["7B", "13B"], SYSTEMS, 2, BASE, [720.0, 120.0], ["trace", "burst"]))
    first = [(run.kind, run.model, run.system) for run in found[:8]]
    assert first == [(kind, model, s) for model in ("7B", "13B") for kind in ("trace", "burst") for s in SYSTEMS]
    assert [(run.kind, run.sources) for run in found[8:12]] == [("burst", 2)] * 4
    assert {run.seed for run in found[:12]} == {1}
    assert {run.seed for run in found[12:]} == {2}
    assert len(set(found)) == len(found) == 24


def test_host_copies_that_were_paced_by_the_link_alone() -> None:
    """Live runs until 2026-11-28: FaaSNet's host copies fed others at 50 instead of 26 GB/s. No live run is such any more."""
    paces = [replace(BASE, host_source=source).simulated(4, 16).backend.transfers for source in ("pcie", "link")]
    assert [each.host_source_bytes_per_s for each in paces] == [None, 1e12]
    with pytest.raises(UserError, match="nothing paces host copies by the link alone any more"):
        replace(BASE, host_source="link").live(Site(checkpoint="x", nodes=4, blocks=16, device="cpu", transport="shm"), "")


def test_every_seed_has_its_window_and_13b_half_the_compression() -> None:
    found = list(orders(["7B", "13B"], ["ideal"], 3, BASE, [720.0, 120.0], ["trace"]))
    assert [(run.start_s, run.compression) for run in found] == [(720, 18), (720, 9), (120, 18), (120, 9), (720, 18), (720, 9)]
    generated = next(orders(["7B"], ["ideal"], 1, replace(BASE, arrivals="generated"), [720.0], ["trace"]))
    assert generated.start_s == 0.0, "a generated trace has no such second"


def test_settings_of_both_backends() -> None:
    assert network("none") == []
    burst = next(orders(["7B"], ["ideal"], 1, BASE, [720.0], ["burst"]))
    live = burst.live(Site(checkpoint="tiny", blocks=8, device="cpu", transport="shm"), "/nowhere")
    sim = burst.simulated(4, 8)
    assert live.system == sim.system
    assert live.cluster == sim.cluster, "both decide by the same profile"
    requests = live.workload.load(models=["m"], seed=1).requests
    assert [(len(requests), each.arrival_s, each.prompt_tokens, each.output_tokens) for each in requests[:1]] == [
        (40, BURST_AT_S, 128, 64)
    ]
    with pytest.raises(UserError, match="tiny cannot be simulated"):
        replace(burst, model="tiny").simulated(4, 8)


def test_a_machine_does_not_repeat_its_runs(tmp_path: Path) -> None:
    runs = [BURST, replace(BURST, system="ideal")]
    tables(tmp_path, runs)
    read = Tables(tmp_path)
    assert read.done("4 x H200") == set(runs)
    assert read.done("4 x H100") == set()
    assert read.next_run == 3


def test_a_simulation_of_itself_has_no_error(tmp_path: Path) -> None:
    frames = tables(tmp_path, [replace(BURST, system=system) for system in SYSTEMS]).frames
    found = list(pairs(*frames.values()))
    table = errors(found).set_index(["system", "measure"])
    assert table.error_percent.abs().max() == pytest.approx(0.0, abs=1e-6)
    assert table.error_low.isna().all(), "one run has no interval"
    assert table.times_reference["lambdascale"].tolist() == pytest.approx([1.0] * 6)
    assert table.times_reference["ideal", "ttft_p50_s"] < 1.0
    assert table.live["ideal", "ramp_s"] < table.live["lambdascale", "ramp_s"]


def test_a_simulated_burst_is_as_late_as_the_live_one() -> None:
    """A live burst at a look of the autoscaler is some milliseconds late for it: both wait for the next one."""

    def last_s(late_s: float) -> float:
        run = replace(BURST, system="faasnet")
        return float(simulated(run, arrivals(40), nodes=4, blocks=16, late_s=late_s)[0].measures["ttft_max_s"])

    assert last_s(0.006) == pytest.approx(last_s(0.0) + 0.1, abs=0.01)


def test_errors_are_of_the_simulation_in_per_cent_of_live(tmp_path: Path) -> None:
    frames = tables(tmp_path, [BURST]).frames
    frames["gpu_figures"]["ttft_p50_s"] *= 2.0
    table = errors(list(pairs(*frames.values()))).set_index("measure")
    assert table.error_percent["ttft_p50_s"] == pytest.approx(-50.0)


def test_five_seeds_have_an_interval(tmp_path: Path) -> None:
    frames = tables(tmp_path, [replace(BURST, seed=seed) for seed in range(1, 6)]).frames
    frames["gpu_figures"]["ttft_p50_s"] *= [1.0, 1.1, 1.2, 0.9, 1.0]
    row = errors(list(pairs(*frames.values()))).set_index("measure").loc["ttft_p50_s"]
    assert row.runs == 5
    assert -20 < row.error_low < row.error_percent < row.error_high < 20


def test_a_run_without_its_requests_is_an_error(tmp_path: Path) -> None:
    frames = tables(tmp_path, [BURST]).frames
    with pytest.raises(UserError, match="run 1 has 40 requests, and 39 rows of them"):
        list(pairs(frames["gpu_figures"], frames["gpu_figures_requests"].iloc[1:], frames["gpu_figures_gpus"]))


def requests(*spans: tuple[float, float, int]) -> pd.DataFrame:
    columns = ["first_token_s", "finished_s", "output_tokens"]
    return pd.DataFrame(spans, columns=columns).assign(arrival_s=1.0)


def test_tokens_per_second_and_when_they_were_reached() -> None:
    rows = requests((2.0, 4.0, 20), (3.0, 4.0, 30), (3.5, 3.5, 1))
    times, rates = token_rates(rows)
    assert (times.tolist(), rates.max()) == ([2.0, 3.0, 4.0, 4.0], 40.0)
    assert (reached_s(rows, 10.0), reached_s(rows, 10.1)) == (1.0, 2.0)
    assert pd.isna(reached_s(rows, 41.0))
    assert len(token_rates(rows.iloc[:0])[1]) == 0


def test_a_ramp_is_to_the_rate_of_the_fastest_system() -> None:
    """A system that never has as many replicas has not ramped up, whatever its own peak."""

    def pair(system: str, rate: int) -> Pair:
        row = {"kind": "burst", "model": "7B", "system": system, "sources": 1, "seed": 1, "link": "none", "host_copies": False}
        row |= {"profile": "h200", "host_source": "pcie"}
        run = Outcome(row | {"measured_on": "x", "peak_tokens_per_s": float(rate)}, requests((2.0, 3.0, rate)), pd.DataFrame())
        return Pair(run.measures, run, [run])

    slow, fast = with_ramps([pair("lambdascale", 10), pair("ideal", 100)])
    assert (fast.row["ramp_s"], fast.simulated("ramp_s")) == (1.0, 1.0)
    assert pd.isna(slow.row["ramp_s"])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    trace = replace(BASE, arrivals="generated")
    runs = [replace(run, system=system, model=model) for run in (trace, BURST) for system in SYSTEMS for model in ("7B", "13B")]
    return curves(list(pairs(*tables(tmp_path_factory.mktemp("tables"), runs).frames.values())))


def test_curves_of_both_sides(drawn: pd.DataFrame) -> None:
    assert set(drawn.panel) == {"rampup", "ttft", "gpus"}
    assert (drawn.live - drawn.simulated).abs().max() == pytest.approx(0.0, abs=1e-9)
    tokens = drawn[(drawn.panel == "rampup") & (drawn.model == "7B") & (drawn.system == "ideal")]
    step = tokens["at"].diff().iloc[1]
    assert (tokens.live * step).sum() == pytest.approx(40 * 64, rel=0.01), "all tokens"


def test_the_figure(drawn: pd.DataFrame, tmp_path: Path) -> None:
    one, two = (render("gpu_live", drawn, tmp_path / part) for part in ("a", "b"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    render("gpu_live", drawn[(drawn.panel != "rampup") | (drawn.model == "7B")], tmp_path / "c")
    broken = {
        "no value for .*, ideal": drawn.assign(live=drawn.live.where(drawn.system != "ideal")),
        "lacks the columns panel": drawn.drop(columns="panel"),
        "no rows": drawn.iloc[:0],
    }
    for message, table in broken.items():
        with pytest.raises(UserError, match=message):
            render("gpu_live", table, tmp_path / "d")


def test_a_panel_names_the_systems_that_were_not_run(drawn: pd.DataFrame) -> None:
    """Their curves are missing in that panel, and in no other."""
    lacking = drawn[(drawn.system != "ideal") | (drawn.model == "7B") | (drawn.panel != "ttft")]
    figure = gpu_live.draw(gpu_live.tidy(lacking))
    titles = [axis.get_title() for axis in figure.axes]
    assert [title for title in titles if "not run" in title] == ["13B, not run: Ideal"]
    assert titles.count("13B") == titles.count("7B") - 1 == 2


def test_a_measured_figure_is_drawn_where_its_table_is(drawn: pd.DataFrame, tmp_path: Path) -> None:
    assert figures_in(tmp_path) == list(FIGURES)
    with pytest.raises(UserError, match=r"no table gpu_live.*scripts/gpu_figures.py --compare"):
        load_table(tmp_path, "gpu_live")
    drawn.to_csv(tmp_path / "gpu_live.csv", index=False)
    assert figures_in(tmp_path) == [*FIGURES, "gpu_live"]
    assert len(load_table(tmp_path, "gpu_live")) == len(drawn)


def test_models_are_packed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(random_models.SHAPES, "mini", (64, 4, 4, 128))
    found = random_models.packed(["mini"], tmp_path, 2)
    assert len(PackedModel.open(found["mini"]).blocks) == 2
    monkeypatch.setattr(random_models, "COMMAND", ["false"])
    assert random_models.packed(["mini"], tmp_path, 2) == found, "the one that exists"
    with pytest.raises(RuntimeError, match=r"packing mini under .* failed: exit status 1"):
        random_models.packed(["mini"], tmp_path, 4)


def test_a_run_that_loses_a_node_is_not_kept() -> None:
    with pytest.raises(DisturbedRunError, match="node 2 was lost"):
        check_undisturbed(NodeLost(1.0, 2))
    check_undisturbed(NodeJoined(1.0, 2))
