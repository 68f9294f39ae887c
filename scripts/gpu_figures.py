"""Run figures 8 to 11 live on a machine's GPUs, all systems, and simulate the same requests on its measured profile.

python scripts/gpu_figures.py [--models 7B,13B] [--traces DIR] [--nodes 4] [--link 400Gb/s] [--seeds 3] [--systems A,B]
    [--kinds trace,burst] [--trace-s 30] [--starts 720,120,840] [--profile NAME] [--memory /dev/shm] [--limit-s 560] [--out DIR]
python scripts/gpu_figures.py --compare [--profile NAME] [--out DIR]

A trace (figures 10 and 11) is a window of the authors' arrivals, in TRACES/lambdascale_30min_arrivals.txt; without the file a
generated one. Its gaps are divided by 18 for 7B and by 9 for 13B, three times as much as by the authors: an H200 answers 64
tokens in a third of their time. Then four nodes are as busy as they should be: from second 720 on, one replica is enough for half
of the time and all four are needed for a third of it, with 20 to 30 scale-outs; 120 is busier and 840 alike (simulated). A burst
(figures 8 and 9) is one of --count requests, with one source and with two. Models are sizes, which are packed with random weights
under --memory, names of built-in ones, or folders.

Every run starts real node processes, one per GPU, and adds its rows to gpu_figures.csv, gpu_figures_requests.csv and
gpu_figures_gpus.csv. Runs that these tables have from this machine are not repeated: a second call goes on where the first one
was cut off. No run begins that would not end within --limit-s. --compare needs no GPU: it simulates the tables' runs and writes
gpu_figures_errors.csv, and gpu_live.csv for scripts/figures.py --only gpu_live.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from lambdascale.calibration.random_models import SHAPES, packed
from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser
from lambdascale.core import UserError
from lambdascale.experiments.gpu_figures import SYSTEMS, Tables, carried_out, curves, errors, orders, pairs
from lambdascale.experiments.gpu_runs import FigureRun, Site, profile_of

TRACE = "lambdascale_30min_arrivals.txt"
# Seconds beyond those expected after which a run is given up.
PATIENCE_S = 60.0


class TooLongError(RuntimeError):
    """A run has not ended."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TooLongError in the block after so many seconds."""

    def give_up(_number: int, _frame: object) -> None:
        raise TooLongError(f"it had not ended after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def live(run: FigureRun, site: Site, traces: Path) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """Carry out a live run; return its row, its requests' and its GPUs'."""
    began = time.monotonic()
    experiment = run.live(site, str(traces))
    requests = experiment.workload.load(models=[model.name for model in experiment.models], seed=run.seed).requests
    with at_most(run.expected_s + PATIENCE_S):
        outcome = carried_out(run, experiment, requests)
    row = {**run.row(), **outcome.measures, "nodes": site.nodes, "blocks": site.blocks}
    return row | {"wall_s": time.monotonic() - began, "backend": "live"}, outcome.requests, outcome.gpus


def measure(arguments: argparse.Namespace) -> int:
    """Carry out what the tables lack of the live runs, as far as time allows; return the exit status."""
    began = time.monotonic()
    import torch

    from lambdascale.calibration.cards import card

    on = card(arguments.device)
    measured_on, tables = f"{on}, torch {torch.__version__}", Tables(arguments.out)
    authors = (arguments.traces / TRACE).is_file()
    if not authors:
        print(f"no {arguments.traces / TRACE}: the trace is a generated one (workload=bursty)", file=sys.stderr)
    sites = sites_of(arguments)
    print(f"{time.monotonic() - began:.1f} s: models are packed", flush=True)
    profile = arguments.profile or profile_of(on)
    runs = [run for run in wanted(arguments, profile, authors) if run not in tables.done(measured_on)]
    left: list[str] = []
    failed = 0
    if runs:  # a mistake in the settings ends all here
        live(replace(runs[0], kind="burst", arrivals="burst", count=8, host_copies=False), sites[runs[0].model], arguments.traces)
    for run in runs:
        at_s = time.monotonic() - began
        name = f"{run.kind} {run.model} {run.system} k={run.sources} seed {run.seed}"
        if at_s + run.expected_s > arguments.limit_s:
            left.append(name)
            continue
        try:
            row, requests, gpus = live(run, sites[run.model], arguments.traces)
        except Exception as error:  # the next run may well go: the machine is lent for minutes
            failed += 1
            print(f"{at_s:.1f} s: {name} FAILED: {type(error).__name__}: {error}", flush=True)
            continue
        number = tables.next_run
        tables.add(
            pd.DataFrame([{"run": number, **row, "measured_on": measured_on}]),
            requests.assign(run=number),
            gpus.assign(run=number),
        )
        shown = ("finished", "failed", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "gpu_seconds", "scale_outs", "wall_s")
        print(f"{at_s:.1f} s: {name}:", *(f"{key} {row[key]:.3g}" for key in shown), flush=True)
    if left:
        print(f"{len(left)} runs left out for lack of time; the first: {left[0]}")
    return int(failed > 0)


def wanted(arguments: argparse.Namespace, profile: str, authors: bool) -> Iterator[FigureRun]:
    """Return the runs that were asked for."""
    base = FigureRun(
        kind="trace",
        model="",
        system="",
        sources=1,
        seed=1,
        profile=profile,
        link=arguments.link,
        pcie=arguments.pcie,
        ssd=arguments.ssd,
        arrivals="authors" if authors else "generated",
        start_s=0.0,
        length_s=arguments.trace_s,
        compression=arguments.compression,
        count=arguments.count,
        prompt_tokens=arguments.prompt,
        output_tokens=arguments.output,
        host_copies=arguments.host_copies,
    )
    models = [Path(model).name for model in arguments.models.split(",")]
    starts = [float(start) for start in arguments.starts.split(",")]
    return orders(models, arguments.systems.split(","), arguments.seeds, base, starts, arguments.kinds.split(","))


def sites_of(arguments: argparse.Namespace) -> dict[str, Site]:
    """Return where each model runs; models of known sizes are packed, all at once."""
    models = arguments.models.split(",")
    folders = packed([model for model in models if model in SHAPES], arguments.memory, arguments.blocks)
    site = Site(
        checkpoint="", nodes=arguments.nodes, blocks=arguments.blocks, device=arguments.device, transport=arguments.transport
    )
    return {Path(model).name: replace(site, checkpoint=str(folders.get(model, model))) for model in models}


def compare(folder: Path, profile: str | None) -> None:
    """Simulate the runs of the tables, on another profile if one is given, and write the errors and the figure's curves."""
    tables = Tables(folder).frames
    if tables["gpu_figures"].empty:
        raise UserError(f"no gpu_figures.csv in {folder}: run this script on a machine with GPUs first")
    if profile is not None:
        tables["gpu_figures"]["profile"] = profile
    found = list(pairs(*tables.values()))
    table = errors(found)
    table.to_csv(folder / "gpu_figures_errors.csv", index=False, float_format="%.4g")
    curves(found).to_csv(folder / "gpu_live.csv", index=False, float_format="%.4g")
    shown = ["kind", "model", "system", "sources", "measure", "runs", "live", "simulated", "error_percent", "times_reference"]
    print(table[shown].to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    print(table.groupby(["kind", "measure"]).error_percent.agg(lambda e: e.abs().median()).rename("median of |error|, per cent"))


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", action="store_true", help="simulate the runs of the tables, without a GPU")
    parser.add_argument("--models", default="7B,13B", help="sizes, names of built-in models, or folders (default: %(default)s)")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="folder for packed models (default: %(default)s)")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="choices of conf/system (default: %(default)s)")
    parser.add_argument("--kinds", default="trace,burst", help="of runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a setting, seed 1 first (default: %(default)s)")
    traces = Path(os.environ.get("LAMBDASCALE_TRACES", "data/traces"))
    parser.add_argument("--traces", type=Path, default=traces, metavar="DIR", help="folder of the authors' trace")
    parser.add_argument("--trace-s", type=float, default=30.0, help="seconds that a trace takes")
    parser.add_argument("--starts", default="720,120,840", help="seconds of the trace at which the seeds' windows begin")
    parser.add_argument("--compression", type=float, default=18.0, help="what gaps are divided by; for 13B half of it")
    parser.add_argument("--host-copies", action=argparse.BooleanOptionalAction, default=True, help="in traces")
    parser.add_argument("--count", type=int, default=100, help="requests of a burst")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens of a request (default: %(default)s)")
    parser.add_argument("--output", type=int, default=64, help="output tokens of a request (default: %(default)s)")
    parser.add_argument("--profile", metavar="NAME", help="of conf/cluster/measured (default: the card's; to compare: the runs')")
    parser.add_argument("--link", default="400Gb/s", help="rate between nodes, or none: nothing is paced (default: %(default)s)")
    parser.add_argument("--pcie", default="26GB/s", help="rate of loads from host memory; the testbed's")
    parser.add_argument("--ssd", default="5GB/s", help="rate of loads from disk; the testbed's")
    parser.add_argument("--nodes", type=int, default=4, help="node processes (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=16, help="blocks of a built-in model (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="nodes compute on (default: %(default)s)")
    parser.add_argument("--transport", default="cuda_ipc", help="way of the blocks between nodes (default: %(default)s)")
    parser.add_argument("--limit-s", type=float, default=560.0, help="seconds within which runs end (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/tables"), help="folder of the tables (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.compare:
        compare(arguments.out, arguments.profile)
        return 0
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(run_guarded(main))
