"""Bursts on a live cluster of GPUs: λScale with execution pipelines and without, in pairs, over link rates.

python scripts/gpu_bursts.py --model DIR|NAME [--nodes 4] [--links none,400Gb/s,100Gb/s,25Gb/s] [--sources 1,2] [--counts 50,200]
    [--outputs 64] [--bursts 5] [--repeat 1] [--systems lambdascale,nccl_broadcast,serverlessllm] [--cluster measured/h200]
    [--kv recompute,copy] [--host] [--no-pairs] [--no-warm-up] [--device cuda] [--transport cuda_ipc] [--out results/tables]
    [--timelines DIR] [--limit-s 540] [--period-s S]

Each run starts real node processes, one per GPU, with as many replicas as sources, and sends --bursts bursts, each of which
needs all nodes; in between, nodes are released. With --host no replica exists before a burst, every node has the model in host
memory, and --links are rates of PCIe. --period-s is the time from one burst to the next: by default what both sides of a pair
need in the simulation on --cluster, twice that where two nodes share a GPU, and some more. The pairs alternate on the same
machine, after a burst that is not counted: in a machine's first run, kernels are compiled while it serves. Adds a row a burst
to gpu_bursts.csv, or to gpu_bursts_shared.csv where nodes share GPUs, and prints the ratios of this call. Bursts that met
others do not count. Once --limit-s is over, no more runs begin, and the output says how many were left out. With --timelines
every run also leaves a folder of what the controller and the nodes' compute threads did when: scripts/scaleout_parts.py prints
it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from lambdascale.calibration.scaleout_parts import ControllerRows
from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser
from lambdascale.experiments.gpu_bursts import MEASURES, BurstRun, Row, measure, paired, period_s, ratio
from lambdascale.experiments.gpu_runs import DisturbedRunError, Site, numbers


def orders(arguments: argparse.Namespace) -> Iterator[tuple[BurstRun, int]]:
    """Yield runs and seeds: seed by seed, λScale's pairs in alternation for each setting; last the other systems, once each.

    Without pipelines nothing switches mode, so that one run counts for every ``kv``.
    """
    sources = [0] if arguments.host else arguments.sources
    axes = (arguments.links.split(","), sources, arguments.counts, arguments.outputs, arguments.kv.split(","))
    settings = [_run(arguments, *values) for values in product(*axes)]
    systems, first = arguments.systems.split(","), settings[0].kv
    for seed in range(1, arguments.repeat + 1):
        for place, setting in enumerate(settings):
            for pipelines in (True, False) if (seed + place) % 2 else (False, True):
                if pipelines or (arguments.pairs and setting.kv == first):
                    yield replace(setting, pipelines=pipelines), seed
    for setting in settings:
        for system in systems:
            if system != "lambdascale":
                yield replace(setting, system=system, pipelines=False), 1


def _run(arguments: argparse.Namespace, link: str, sources: int, count: int, output_tokens: int, kv: str) -> BurstRun:
    return BurstRun(
        model=Path(arguments.model).name,
        system="lambdascale",
        pipelines=True,
        nodes=arguments.nodes,
        cluster=arguments.cluster,
        link=link,
        sources=sources,
        count=count,
        prompt_tokens=arguments.prompt,
        output_tokens=output_tokens,
        kv=kv,
        tier="host" if arguments.host else "gpu",
    )


def one(arguments: argparse.Namespace, run: BurstRun, seed: int, bursts: int) -> list[Row]:
    """Carry a run out and return a row for each burst."""
    site = Site(
        checkpoint=arguments.model,
        nodes=arguments.nodes,
        blocks=arguments.blocks,
        device=arguments.device,
        transport=arguments.transport,
    )
    period = 1.0  # which one burst does not need
    if bursts > 1:
        period = arguments.period_s or period_s(run, arguments.blocks, sharing=sharing(arguments))
    folder = None if arguments.timelines is None else arguments.timelines / f"{run}-{seed}"
    experiment = run.live(site, bursts=bursts, period_s=period, seed=seed, timeline=None if folder is None else str(folder))
    rows = None if folder is None else ControllerRows()
    found = measure(run, experiment, [] if rows is None else [rows], seed=seed)
    if folder is not None and rows is not None:
        rows.write(folder)
    return [{**run.row(), "seed": seed, **each, "backend": "live"} for each in found]


def sharing(arguments: argparse.Namespace) -> int:
    """Return how many nodes share a GPU at most; 1 on CPUs."""
    import torch

    return 1 if arguments.device == "cpu" else -(-arguments.nodes // max(1, torch.cuda.device_count()))


def ratios(runs: pd.DataFrame) -> pd.DataFrame:
    """Return, by setting, the ratio of each measure with pipelines over without, and its interval of 95 %."""
    found = []
    for setting, pairs in paired(runs):
        varied = {key: setting[key] for key in ("model", "tier", "link", "sources", "count", "output_tokens", "kv")}
        for name in MEASURES:
            typical = ratio(pairs, name)
            interval = {"ratio": typical.value, "low": typical.low, "high": typical.high}
            found.append({**varied, "measure": name, "pairs": len(pairs), **interval})
    return pd.DataFrame(found)


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="a packed model or a built-in one's name")
    parser.add_argument("--blocks", type=int, default=16, help="blocks of a built-in model (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=4, help="node processes (default: %(default)s)")
    parser.add_argument("--cluster", default="measured/h200", help="a choice of conf/cluster, which decisions use")
    parser.add_argument(
        "--links", default="none,100Gb/s,25Gb/s", help="rates between nodes; none: not paced (default: %(default)s)"
    )
    parser.add_argument("--sources", type=numbers, default=[1], help="replicas before a burst (default: 1)")
    parser.add_argument("--counts", type=numbers, default=[200], help="requests of a burst")
    parser.add_argument("--outputs", type=numbers, default=[64], help="output tokens of a request")
    parser.add_argument("--kv", default="recompute", help="at mode switches: recompute, copy, cheapest")
    parser.add_argument("--host", action="store_true", help="start from copies in host memory, one on each node")
    parser.add_argument("--pairs", action=argparse.BooleanOptionalAction, default=True, help="runs without pipelines, too")
    parser.add_argument(
        "--warm-up", action=argparse.BooleanOptionalAction, default=True, help="a burst first that is not counted"
    )
    parser.add_argument("--bursts", type=int, default=5, help="bursts of a run, on the same processes")
    parser.add_argument("--period-s", type=float, help="seconds from a burst to the next (default: by simulation)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of a setting, on new processes")
    parser.add_argument(
        "--systems", default="lambdascale,nccl_broadcast,serverlessllm", help="choices of conf/system (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="nodes compute on (default: %(default)s)")
    parser.add_argument("--transport", default="cuda_ipc", help="way of the blocks between nodes (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens of a request (default: %(default)s)")
    parser.add_argument("--limit-s", type=float, default=540.0, help="seconds after which no run begins (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/tables"), help="folder of the tables (default: %(default)s)")
    parser.add_argument("--timelines", type=Path, metavar="DIR", help="keep every run's timeline there")
    arguments = parser.parse_args()
    import torch

    from lambdascale.calibration.cards import card

    on = card(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / ("gpu_bursts_shared.csv" if sharing(arguments) > 1 else "gpu_bursts.csv")
    before = pd.read_csv(path) if path.exists() else pd.DataFrame()
    found: list[dict[str, Any]] = []
    began, left, failed = time.monotonic(), 0, 0
    for place, (run, seed) in enumerate(orders(arguments)):
        if place == 0 and arguments.warm_up:
            one(arguments, run, 0, 1)
        if time.monotonic() - began > arguments.limit_s:
            left += 1
            continue
        try:
            rows = one(arguments, run, seed, arguments.bursts)
        except DisturbedRunError as error:
            failed += 1
            print(f"{run}-{seed} FAILED: {error}", flush=True)
            continue
        where = f"{on}, torch {torch.__version__}"
        if sharing(arguments) > 1:
            where += f"; {arguments.nodes} nodes"
        found += [{**row, "measured_on": where} for row in rows]
        times = ", ".join(" ".join(f"{row[name]:.3g}" for name in MEASURES) for row in rows)
        print(f"{time.monotonic() - began:.1f} {run}-{seed}: {times}", flush=True)
        pd.concat([before, pd.DataFrame(found)]).to_csv(path, index=False, float_format="%.4g")
    if left:
        print(f"{left} runs left out: --limit-s was over")
    if found:
        print(ratios(pd.DataFrame(found)).to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(run_guarded(main))
