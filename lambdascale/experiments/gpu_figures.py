"""Figures 8 to 11 live on GPUs: the order of the runs, their rows, and the simulator on a measured profile beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lambdascale.core import TracedRequest, UserError, traced
from lambdascale.experiments.build import Experiment
from lambdascale.experiments.gpu_runs import FigureRun, check_undisturbed
from lambdascale.experiments.runner import drive_experiment
from lambdascale.figures.rampup import token_rate
from lambdascale.metrics import Recorder, events_table, gpu_usage, requests_table, summarise
from lambdascale.metrics.intervals import Interval, RunRows, over_draws
from lambdascale.metrics.over_time import reached_s, token_rates
from lambdascale.metrics.scaleouts import scale_out_times

Row = dict[str, Any]
SYSTEMS = ("lambdascale", "faasnet", "nccl_broadcast", "serverlessllm", "ideal")
REFERENCE = "lambdascale"
#: Measures that simulations are compared by, by kind of run.
MEASURES = {
    "trace": ("ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "gpu_seconds", "scale_outs"),
    "burst": ("ttft_p50_s", "ttft_p90_s", "ttft_max_s", "ramp_s", "peak_tokens_per_s", "all_finished_s"),
}
# What tells the runs of a setting apart from those of another; seeds are draws of one.
_SETTING = ["kind", "model", "system", "sources", "link", "host_copies", "host_source", "profile", "measured_on"]
_REQUESTS = ["request_id", "arrival_s", "first_token_s", "finished_s", "output_tokens", "first_token_mode"]
# Set-ups of communicators are drawn: so many simulations of a broadcast.
_DRAWS = {"nccl_broadcast": 5}
# Tables of live runs, and the digits of their numbers: arrivals are simulated anew.
_TABLES = {"gpu_figures": "%.5g", "gpu_figures_requests": "%.7g", "gpu_figures_gpus": "%.7g"}
_POINTS = 41
# A burst has ramped up at this share of the highest rate that any system reached.
_RAMPED = 0.75


@dataclass(frozen=True)
class Outcome:
    """A run that is over: its measures, and rows of its requests and of its GPUs in use, in seconds of the run."""

    measures: Row
    requests: pd.DataFrame
    gpus: pd.DataFrame


class Tables:
    """The tables of live runs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.frames = {
            name: pd.read_csv(path) if (path := folder / f"{name}.csv").exists() else pd.DataFrame() for name in _TABLES
        }

    def add(self, *frames: pd.DataFrame) -> None:
        """Add one frame of rows to each of the tables, in the tables' order, and write all of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for (name, digits), rows in zip(_TABLES.items(), frames, strict=True):
            self.frames[name] = pd.concat([self.frames[name], rows], ignore_index=True)
            self.frames[name].to_csv(self.folder / f"{name}.csv", index=False, float_format=digits)

    def done(self, measured_on: str) -> set[FigureRun]:
        """Return the runs that a machine has done."""
        rows = _records(self.frames["gpu_figures"])
        return {FigureRun.of_row(row) for row in rows if row["measured_on"] == measured_on}

    @property
    def next_run(self) -> int:
        """Return the number of the next run."""
        rows = self.frames["gpu_figures"]
        return 1 if rows.empty else int(rows.run.max()) + 1


def _records(table: pd.DataFrame) -> list[Row]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def orders(
    models: Sequence[str], systems: Sequence[str], seeds: int, base: FigureRun, starts: Sequence[float], kinds: Sequence[str]
) -> Iterator[FigureRun]:
    """Yield the runs, the most valuable first: by seed, each model's trace and burst with one source, then bursts with two.

    ``base`` has what they share; ``starts``: where in the trace each seed's window begins, from the first again if seeds are
    more. 13B's gaps are divided by half as much as 7B's, as the authors did.
    """
    for seed in range(1, seeds + 1):
        for sources in (1, 2):
            for model in models:
                for kind in kinds:
                    if kind == "trace" and sources > 1:
                        continue
                    for system in systems:
                        run = replace(base, kind=kind, model=model, system=system, sources=sources, seed=seed)
                        yield _as_trace(run, starts[(seed - 1) % len(starts)]) if kind == "trace" else _as_burst(run)


def _as_trace(run: FigureRun, start_s: float) -> FigureRun:
    compression = run.compression / 2 if run.model == "13B" else run.compression
    begins = start_s if run.arrivals == "authors" else 0.0
    return replace(run, compression=compression, start_s=begins, count=0)


def _as_burst(run: FigureRun) -> FigureRun:
    return replace(run, arrivals="burst", start_s=0.0, length_s=0.0, compression=1.0, host_copies=False)


def carried_out(run: FigureRun, experiment: Experiment, requests: Sequence[TracedRequest]) -> Outcome:
    """Drive a run, simulated or live, and return what came of it. DisturbedRunError if a node was lost."""
    recorder = Recorder()
    drive_experiment(experiment, requests, run.seed, recorder)
    for _, entry in recorder.entries:
        check_undisturbed(entry)
    table = requests_table(recorder, run.system, requests)
    summary = summarise(
        recorder,
        table,
        system=run.system,
        backend=experiment.backend.label,
        usd_per_gpu_hour=experiment.cluster.usd_per_gpu_hour,
        wall_s=0.0,
    )
    frame = table.select([*_REQUESTS, "ttft_s", "status"]).to_pandas()
    usage = gpu_usage(recorder).select(["at_s", "delta"]).to_pandas()
    scale_out = scale_out_times(events_table(recorder).to_pandas())
    return Outcome(_measures(summary, frame, scale_out) | {"end_s": recorder.end_s}, frame[_REQUESTS], usage)


def _measures(summary: Row, requests: pd.DataFrame, scale_out: Row) -> Row:
    ok = requests[requests.status == "ok"]
    return {
        "requests": summary["requests"]["submitted"],
        "finished": summary["requests"]["completed"],
        "failed": summary["requests"]["failed"],
        **{f"ttft_{name}_s": summary["ttft_s"][name] for name in ("mean", "p50", "p90", "p99")},
        "ttft_max_s": ok.ttft_s.max(),
        "all_finished_s": ok.finished_s.max() - requests.arrival_s.min(),
        "gpu_seconds": summary["gpu_seconds"],
        "cost_usd": summary["cost_usd"],
        "scale_outs": summary["scale_outs"],
        "first_tokens_of_pipelines": summary["pipeline_first_tokens"],
        "preemptions": summary["preemptions"],
        "restarts": summary["restarts"],
        "late_s": summary["rates"]["drift_s"],
        "peak_tokens_per_s": token_rates(ok)[1].max(initial=0.0),
        **{f"first_{name}": scale_out[name] for name in ("new_nodes", "pipeline_s")},
        "first_replica_s": scale_out["first_node_s"],
        "all_replicas_s": scale_out["all_nodes_s"],
    }


def requests_of(run: FigureRun, rows: pd.DataFrame, model: str, late_s: float = 0.0) -> list[TracedRequest]:
    """Return the requests of a live run from its rows, ``late_s`` later, for a simulation of ``model``."""
    found = zip(rows.request_id.tolist(), (rows.arrival_s + late_s).tolist(), strict=True)
    return [traced(number, at_s, model, run.prompt_tokens, run.output_tokens) for number, at_s in found]


def simulated(run: FigureRun, rows: pd.DataFrame, *, nodes: int, blocks: int, late_s: float = 0.0) -> list[Outcome]:
    """Simulate the requests of a live run, as often as something is drawn.

    A burst comes when the live front end had it, ``late_s`` after its time: so the autoscaler's next look is the same one.
    """
    late_s = late_s if run.kind == "burst" else 0.0
    found = []
    for draw in range(_DRAWS.get(run.system, 1)):
        each = replace(run, seed=run.seed + draw)
        experiment = each.simulated(nodes, blocks)
        found.append(carried_out(each, experiment, requests_of(run, rows, experiment.models[0].name, late_s)))
    return found


@dataclass(frozen=True)
class Pair:
    """A live run's row, and the run live and simulated. ``setting``: see ``_SETTING``."""

    row: Row
    live: Outcome
    sim: list[Outcome]

    @property
    def setting(self) -> tuple[Any, ...]:
        """Return the values of the columns of a setting."""
        return tuple(self.row[name] for name in _SETTING)

    def simulated(self, measure: str) -> float:
        """Return a measure of the simulation, the median of its draws."""
        return float(np.median([each.measures[measure] for each in self.sim]))

    def ramped(self, live_peak: float, simulated_peak: float) -> Pair:
        """Return the pair with ``ramp_s``: seconds from the burst to the shares of these rates."""
        live, *sim = (
            replace(each, measures=each.measures | {"ramp_s": reached_s(each.requests, _RAMPED * peak)})
            for each, peak in ((self.live, live_peak), *((each, simulated_peak) for each in self.sim))
        )
        return Pair(live.measures, live, sim)


def with_ramps(found: Sequence[Pair]) -> list[Pair]:
    """Return the pairs with ``ramp_s``: seconds until three quarters of the highest rate of any system on the same requests."""
    peaks: dict[tuple[Any, ...], list[float]] = {}
    for pair in found:
        most = peaks.setdefault((_without_system(pair), pair.row["seed"]), [0.0, 0.0])
        most[0] = max(most[0], pair.row["peak_tokens_per_s"])
        most[1] = max(most[1], pair.simulated("peak_tokens_per_s"))
    return [pair.ramped(*peaks[_without_system(pair), pair.row["seed"]]) for pair in found]


def pairs(rows: pd.DataFrame, requests: pd.DataFrame, gpus: pd.DataFrame) -> Iterator[Pair]:
    """Simulate every live run of the table; UserError if its requests are missing."""
    for row in _records(rows):
        mine, used = (table[table.run == row["run"]] for table in (requests, gpus))
        if len(mine) != row["requests"]:
            raise UserError(f"run {row['run']} has {row['requests']} requests, and {len(mine)} rows of them are in the table")
        live = Outcome(row, mine, used)
        run, size = FigureRun.of_row(row), {"nodes": int(row["nodes"]), "blocks": int(row["blocks"])}
        sim = simulated(run, mine, **size, late_s=float(row["late_s"]))
        yield Pair(row, live, sim)


def errors(found: Sequence[Pair]) -> pd.DataFrame:
    """Return a row per setting and measure: medians live and simulated over seeds, and the simulator's error in per cent.

    ``times_reference``: the live value over λScale's of the same seed. ``low`` and ``high`` of both: 95 %, from five seeds on.
    """
    table = []
    found = with_ramps(found)
    reference = {(_without_system(pair), pair.row["seed"]): pair.row for pair in found if pair.row["system"] == REFERENCE}
    for setting in dict.fromkeys(pair.setting for pair in found):
        mine = [pair for pair in found if pair.setting == setting]
        for measure in MEASURES[mine[0].row["kind"]]:
            live = [float(pair.row[measure]) for pair in mine]
            sim = [pair.simulated(measure) for pair in mine]
            base = [reference.get((_without_system(pair), pair.row["seed"]), {}).get(measure, math.nan) for pair in mine]
            error, times = _ratio(sim, live), _ratio(live, base)
            table.append(
                {
                    **dict(zip(_SETTING, setting, strict=True)),
                    "measure": measure,
                    "runs": len(mine),
                    "live": float(np.median(live)),
                    "simulated": float(np.median(sim)),
                    **{f"error_{name}": 100 * (value - 1) for name, value in _named(error, "percent").items()},
                    **{f"times_{name}": value for name, value in _named(times, "reference").items()},
                    "backend": "live and sim",
                }
            )
    return pd.DataFrame(table)


def _without_system(pair: Pair) -> tuple[Any, ...]:
    return tuple(pair.row[name] for name in _SETTING if name != "system")


def _named(interval: Interval, value: str) -> dict[str, float]:
    return {value: interval.value, "low": interval.low, "high": interval.high}


def _ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Return the typical ratio of pairs; NaN where one divides by nothing."""
    ratios = [a / b if a > 0 and b > 0 else math.nan for a, b in zip(above, below, strict=True)]
    return over_draws(ratios)


def curves(found: Sequence[Pair]) -> pd.DataFrame:
    """Return the curves of the figure of each model and system, ``live`` and ``simulated``, of runs with one source.

    ``panel`` rampup: tokens per second at ``at`` seconds after a burst, mean over seeds; ttft: TTFT at quantile ``at`` of all
    seeds' requests; gpus: GPU-seconds up to ``at`` seconds of the first seed's trace. Simulations are those of the first draw.
    """
    table = []
    mine = [pair for pair in found if pair.row["sources"] == 1]
    for model in dict.fromkeys(pair.row["model"] for pair in mine):
        of_model = [pair for pair in mine if pair.row["model"] == model]
        for panel, kind, until, curve in _PANELS:
            runs = [pair for pair in of_model if pair.row["kind"] == kind]
            ends = max((each.measures[until] for pair in runs for each in (pair.live, *pair.sim)), default=0.0)
            for system in dict.fromkeys(pair.row["system"] for pair in runs):
                sides = [[pair.live for pair in runs if pair.row["system"] == system]]
                sides.append([pair.sim[0] for pair in runs if pair.row["system"] == system])
                at, *values = curve(sides, ends)
                columns = {"panel": panel, "model": model, "system": system, "at": at, "live": values[0], "simulated": values[1]}
                table.append(pd.DataFrame(columns).assign(backend="live and sim"))
    return pd.concat(table, ignore_index=True) if table else pd.DataFrame()


def _rampup(sides: Sequence[Sequence[Outcome]], end_s: float) -> list[np.ndarray]:
    """Tokens per second since the burst."""
    edges = np.linspace(0.0, end_s, _POINTS + 1)
    found = [np.mean([token_rate(_since_first(each.requests), edges) for each in side], axis=0) for side in sides]
    return [(edges[1:] + edges[:-1]) / 2, *found]


def _since_first(requests: pd.DataFrame) -> pd.DataFrame:
    """Return the answered requests with times since the first arrival."""
    answered = requests.dropna(subset=["finished_s"])
    times = ["first_token_s", "finished_s"]
    return answered.assign(**{name: answered[name] - requests.arrival_s.min() for name in times})


def _ttft(sides: Sequence[Sequence[Outcome]], _end_s: float) -> list[np.ndarray]:
    """TTFT at quantiles."""
    at = np.linspace(0.0, 1.0, _POINTS)
    waits = [pd.concat([each.requests.first_token_s - each.requests.arrival_s for each in side]).dropna() for side in sides]
    return [at, *(np.quantile(each, at) for each in waits)]


def _gpus(sides: Sequence[Sequence[Outcome]], end_s: float) -> list[np.ndarray]:
    """GPU-seconds so far."""
    at = np.linspace(0.0, end_s, _POINTS)
    runs = [RunRows(requests=s[0].requests, gpus=s[0].gpus, end_s=s[0].measures["end_s"]) for s in sides]
    return [at, *(each.gpu_seconds_until(at) for each in runs)]


# Panels of the figure: kind of run, the measure at which the slowest one's curve ends, the curve.
_PANELS = (("rampup", "burst", "all_finished_s", _rampup), ("ttft", "trace", "end_s", _ttft), ("gpus", "trace", "end_s", _gpus))
