"""Bursts on a live cluster of GPUs: λScale with execution pipelines and without, in pairs, over link rates.

python scripts/gpu_bursts.py --model DIR|NAME [--nodes 4] [--links none,100Gb/s,25Gb/s] [--repeat 3] [--out results/tables]
    [--device cuda] [--transport cuda_ipc] [--systems lambdascale,nccl_broadcast,serverlessllm] [--count 50]

Each run starts real node processes, one per GPU, with one replica, and sends a burst that wants all nodes. The pairs alternate on
the same machine. Writes gpu_bursts.csv, a row a run, and prints the paired differences.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lambdascale.cli.guard import run_guarded
from lambdascale.control import build_system, drive
from lambdascale.core.commands import AllocateNode, Command, Serve, SwitchMode
from lambdascale.core.events import BlockArrived, Event, RequestArrived, RequestFinished, TokensProduced
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose


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
        """Note an event."""
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


def one(arguments: argparse.Namespace, system: str, pipelines: bool, link: str, seed: int) -> dict[str, Any]:
    """Run one burst and return its row."""
    paced = link != "none"
    overrides = [
        "cluster=testbed1",
        f"system={system}",
        "system.memory.enabled=false",
        "backend=live",
        f"backend.device={arguments.device}",
        f"transport={arguments.transport}",
        f"backend.checkpoint={arguments.model}",
        f"backend.paced={str(paced).lower()}",
        f"backend.slot_tokens={arguments.prompt + arguments.output}",
        f"system.blocks={arguments.blocks}",
        f"cluster.nodes={arguments.nodes}",
        "cluster.pcie_bytes_per_s=50GB/s",
        "cluster.ssd_bytes_per_s=50GB/s",
        "workload=burst",
        f"workload.count={arguments.count}",
        "workload.at_s=1.0",
        f"workload.prompt_tokens={arguments.prompt}",
        f"workload.output_tokens={arguments.output}",
        f"seed={seed}",
        "logger._target_=builtins.dict",  # no run folder is written, and GPU machines may lack what writes one
    ]
    if paced:
        overrides += [f"cluster.nic_bytes_per_s={link}", "cluster.rdma_efficiency=1.0", "cluster.collective_efficiency=1.0"]
    if system == "lambdascale" and not pipelines:
        overrides.append("system.start.pipelines._target_=lambdascale.pipelines.NoPipelines")
    experiment = build(compose(overrides))
    names = [model.name for model in experiment.models]
    requests = experiment.workload.requests(models=names, seed=seed)
    plane = build_system(experiment.system, cluster=experiment.cluster, models=experiment.models)
    backend = experiment.backend.build(
        cluster=experiment.cluster, models=experiment.models, requests=requests, system=experiment.system, seed=seed
    )
    times = Times()
    try:
        drive(plane, backend, [times])
    finally:
        backend.close()
    return {"system": system, "pipelines": pipelines, "link": link, "seed": seed, **times.row(), "backend": "live"}


def runs(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row a run: pairs of λScale in alternation, then the other systems once per link."""
    for link in arguments.links.split(","):
        for seed in range(1, arguments.repeat + 1):
            for pipelines in (True, False) if seed % 2 else (False, True):
                yield one(arguments, "lambdascale", pipelines, link, seed)
        for system in arguments.systems.split(","):
            if system != "lambdascale":
                yield one(arguments, system, False, link, 1)


def differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, by link, the median of pipelines minus no pipelines over the pairs, and its range, in seconds."""
    ours = rows[rows.system == "lambdascale"].set_index(["link", "seed", "pipelines"])
    found = []
    for measure in ("ttft_p50_s", "ttft_p90_s", "ttft_max_s", "all_finished_s"):
        gain = ours[measure].xs(True, level="pipelines") - ours[measure].xs(False, level="pipelines")
        for link, values in gain.groupby(level="link"):
            found.append({"link": link, "measure": measure, "median": values.median(), "low": values.min(), "high": values.max()})
    return pd.DataFrame(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR|NAME")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--links", default="none,100Gb/s,25Gb/s")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--systems", default="lambdascale,nccl_broadcast,serverlessllm")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--transport", default="cuda_ipc")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("results/tables"))
    arguments = parser.parse_args()
    import torch

    card = "cpu" if arguments.device == "cpu" else f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for row in runs(arguments):
        rows.append({**row, "measured_on": f"{card}, torch {torch.__version__}"})
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        pd.DataFrame(rows).to_csv(arguments.out / "gpu_bursts.csv", index=False, float_format="%.4g")
    print(differences(pd.DataFrame(rows)).to_string(index=False))


if __name__ == "__main__":
    sys.exit(run_guarded(main))
