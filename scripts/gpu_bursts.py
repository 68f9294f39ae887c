"""Bursts on a live cluster of GPUs: λScale with execution pipelines and without, in pairs, over link rates.

python scripts/gpu_bursts.py --model DIR|NAME [--nodes 4] [--links none,400Gb/s,100Gb/s,25Gb/s] [--sources 1,2] [--counts 50,200]
    [--outputs 64] [--repeat 3] [--systems lambdascale,nccl_broadcast,serverlessllm] [--cluster testbed1] [--kv recompute,copy]
    [--no-pairs] [--device cuda] [--transport cuda_ipc] [--out results/tables] [--timelines DIR] [--limit-s 540]

Each run starts real node processes, one per GPU, with as many replicas as sources, and sends a burst that needs all nodes. The
pairs alternate on the same machine, after a run that is not counted: in a machine's first run, kernels are compiled while it
serves. Adds a row a run to gpu_bursts.csv, or to gpu_bursts_shared.csv where nodes share GPUs, and prints the paired differences
of this call. Once --limit-s is over, no further run begins, and the output says how many were left out. With --timelines every
run also leaves a folder of what the controller and the nodes' compute threads did when: scripts/scaleout_parts.py prints it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lambdascale.calibration.scaleout_parts import ControllerRows
from lambdascale.cli.guard import run_guarded
from lambdascale.control import build_system, drive
from lambdascale.core.commands import AllocateNode, Command, Serve, SwitchMode
from lambdascale.core.events import BlockArrived, Event, RequestArrived, RequestFinished, TokensProduced
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.experiments.gpu_runs import UNPACED, DisturbedRunError, Site, check_undisturbed, network, numbers


@dataclass(frozen=True)
class Setting:
    """Settings that vary between runs. ``link``: its rate, none for no limit. ``output_tokens``: of each request.

    ``kv``: what becomes of KV at mode switches.
    """

    link: str
    sources: int
    count: int
    output_tokens: int
    kv: str


class Times:
    """Observer of a run: first tokens, ends, and the steps of the scale-out, in seconds of the run."""

    def __init__(self) -> None:
        self.arrived: dict[int, float] = {}
        self.first: dict[int, float] = {}
        self.by_pipeline = 0
        self.ends: list[float] = []
        self.began: float | None = None
        self.formed: list[float] = []
        self.switched: list[float] = []
        self.last_block = 0.0

    def on_event(self, event: Event) -> None:
        """Note an event. DisturbedRunError if a node was lost."""
        check_undisturbed(event)
        if isinstance(event, RequestArrived):
            self.arrived[event.request.request_id] = event.request.arrival_s
        elif isinstance(event, TokensProduced) and event.request_id not in self.first:
            self.first[event.request_id] = event.at
            self.by_pipeline += event.mode == "pipeline"
        elif isinstance(event, RequestFinished):
            self.ends.append(event.at)
        elif isinstance(event, BlockArrived) and self.arrived:
            self.last_block = event.at

    def on_command(self, at: float, command: Command) -> None:
        """Note a command."""
        if isinstance(command, AllocateNode) and self.arrived and self.began is None:
            self.began = at
        elif isinstance(command, Serve) and command.is_pipeline:
            self.formed.append(at)
        elif isinstance(command, SwitchMode):
            self.switched.append(at)

    def row(self) -> dict[str, Any]:
        """Return the run's measures: TTFT in seconds, and times since the scale-out began."""
        ttft = np.array([self.first[request] - at for request, at in self.arrived.items()])
        began = self.began or 0.0
        start = min(self.arrived.values())
        return {
            "requests": len(self.arrived),
            "finished": len(self.ends),
            "ttft_p50_s": float(np.quantile(ttft, 0.5)),
            "ttft_p90_s": float(np.quantile(ttft, 0.9)),
            "ttft_max_s": float(ttft.max()),
            "all_finished_s": max(self.ends) - start,
            "first_tokens_of_pipelines": self.by_pipeline,
            "pipeline_formed_s": min(self.formed) - began if self.formed else None,
            "last_block_s": self.last_block - began,
        }


def one(arguments: argparse.Namespace, system: str, pipelines: bool, setting: Setting, seed: int) -> dict[str, Any]:
    """Run one burst and return its row."""
    site = Site(
        checkpoint=arguments.model,
        nodes=arguments.nodes,
        blocks=arguments.blocks,
        device=arguments.device,
        transport=arguments.transport,
    )
    overrides = [
        f"cluster={arguments.cluster}",
        f"system={system}",
        "system.memory.enabled=false",
        *site.overrides(paced=setting.link != UNPACED, slot_tokens=arguments.prompt + setting.output_tokens),
        *([f"system.kv={setting.kv}"] if system == "lambdascale" else []),  # others have no mode switches
        *network(setting.link),
        "cluster.pcie_bytes_per_s=50GB/s",
        "cluster.ssd_bytes_per_s=50GB/s",
        "workload=burst",
        f"system.autoscaler.min_replicas={setting.sources}",
        f"workload.count={setting.count}",
        "workload.at_s=1.0",
        f"workload.prompt_tokens={arguments.prompt}",
        f"workload.output_tokens={setting.output_tokens}",
        f"seed={seed}",
    ]
    folder = None if arguments.timelines is None else arguments.timelines / _label(system, pipelines, setting, seed)
    if folder is not None:
        overrides.append(f"backend.timeline={folder}")
    if system == "lambdascale" and not pipelines:
        overrides.append("system.start.pipelines._target_=lambdascale.pipelines.NoPipelines")
    experiment = build(compose(overrides))
    names = [model.name for model in experiment.models]
    requests = experiment.workload.requests(models=names, seed=seed)
    plane = build_system(experiment.system, cluster=experiment.seen, models=experiment.models)
    backend = experiment.backend.build(
        cluster=experiment.cluster, models=experiment.models, requests=requests, system=experiment.system, seed=seed
    )
    times, rows = Times(), ControllerRows()
    try:
        drive(plane, backend, [times] if folder is None else [times, rows])
    finally:
        backend.close()
    if folder is not None:
        rows.write(folder)
    model = Path(arguments.model).name
    row = {
        "model": model,
        "system": system,
        "pipelines": pipelines,
        **asdict(setting),
        "seed": seed,
        "prompt_tokens": arguments.prompt,
    }
    return {**row, **times.row(), "backend": "live"}


def _label(system: str, pipelines: bool, setting: Setting, seed: int) -> str:
    """Return the name of a run's folder."""
    link = setting.link.replace("/", "")
    how = "pipelines" if pipelines else "none"
    return f"{system}-{how}-{link}-{setting.sources}-{setting.count}-{setting.output_tokens}-{setting.kv}-{seed}"


def orders(arguments: argparse.Namespace) -> Iterator[tuple[str, bool, Setting, int]]:
    """Yield the runs: seed by seed, pairs of λScale in alternation for each setting; last the other systems, once a setting.

    Without pipelines nothing switches mode, so that one run counts for every ``kv``.
    """
    axes = (arguments.links.split(","), arguments.sources, arguments.counts, arguments.outputs, arguments.kv.split(","))
    settings = [Setting(*values) for values in product(*axes)]
    systems, first = arguments.systems.split(","), settings[0].kv
    for seed in range(1, arguments.repeat + 1):
        for setting in settings:
            for pipelines in (True, False) if seed % 2 else (False, True):
                if pipelines or (arguments.pairs and setting.kv == first):
                    yield "lambdascale", pipelines, setting, seed
    for setting in settings:
        yield from ((system, False, setting, 1) for system in systems if system != "lambdascale")


def differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, by setting, the median of pipelines minus no pipelines over the pairs, and its range, in seconds."""
    setting = ["model", "link", "sources", "count", "output_tokens", "kv"]
    ours = rows[rows.system == "lambdascale"].set_index([*setting, "seed", "pipelines"])
    found = []
    for measure in ("ttft_p50_s", "ttft_p90_s", "ttft_max_s", "all_finished_s"):
        sides = [
            ours[measure].xs(side, level="pipelines") for side in (True, False) if (ours.index.get_level_values(-1) == side).any()
        ]
        if len(sides) < 2:
            continue
        levels = [name for name in sides[1].index.names if name != "kv"]
        without = sides[1].droplevel("kv").reindex(pd.MultiIndex.from_frame(sides[0].index.to_frame()[levels]))
        for key, values in (sides[0] - without.to_numpy()).dropna().groupby(level=setting):
            low, high = values.min(), values.max()
            found.append(
                {
                    **dict(zip(setting, key, strict=True)),
                    "measure": measure,
                    "pairs": len(values),
                    "median": values.median(),
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR|NAME")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--cluster", default="testbed1", help="a choice of conf/cluster, whose compute model decisions use")
    parser.add_argument("--links", default="none,100Gb/s,25Gb/s")
    parser.add_argument("--sources", type=numbers, default=[1])
    parser.add_argument("--counts", type=numbers, default=[200], help="requests of a burst")
    parser.add_argument("--outputs", type=numbers, default=[64], help="output tokens of a request")
    parser.add_argument("--kv", default="recompute", help="at mode switches: recompute, copy, cheapest")
    parser.add_argument("--pairs", action=argparse.BooleanOptionalAction, default=True, help="runs without pipelines, too")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--systems", default="lambdascale,nccl_broadcast,serverlessllm")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--transport", default="cuda_ipc")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--limit-s", type=float, default=540.0, help="seconds after which no run begins (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/tables"))
    parser.add_argument("--timelines", type=Path, metavar="DIR", help="keep every run's timeline there")
    arguments = parser.parse_args()
    import torch

    card = "cpu" if arguments.device == "cpu" else f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    shared = arguments.device == "cuda" and arguments.nodes > torch.cuda.device_count()
    path = arguments.out / ("gpu_bursts_shared.csv" if shared else "gpu_bursts.csv")
    before = pd.read_csv(path) if path.exists() else pd.DataFrame()
    rows: list[dict[str, Any]] = []
    began, left, failed = time.monotonic(), 0, 0
    first = Setting("none", arguments.sources[0], arguments.counts[0], arguments.outputs[0], arguments.kv.split(",")[0])
    one(arguments, "lambdascale", True, first, 0)
    for order in orders(arguments):
        if time.monotonic() - began > arguments.limit_s:
            left += 1
            continue
        try:
            row = one(arguments, *order)
        except DisturbedRunError as error:
            failed += 1
            print(f"{_label(*order)} FAILED: {error}", flush=True)
            continue
        rows.append({**row, "measured_on": f"{card}, torch {torch.__version__}"})
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k not in ("backend", "prompt_tokens")}
        print(round(time.monotonic() - began, 1), *shown.values(), flush=True)
        pd.concat([before, pd.DataFrame(rows)]).to_csv(path, index=False, float_format="%.4g")
    if left:
        print(f"{left} runs left out: --limit-s was over")
    if rows:
        print(differences(pd.DataFrame(rows)).to_string(index=False))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(run_guarded(main))
