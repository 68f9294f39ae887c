"""Multicasts at the size of a full host, one node process per GPU: groups, sources, blocks and systems, beside their limits.

python scripts/gpu_host.py [--models 7B,13B,70B] [--groups 2,4,8] [--sources 1,2,4] [--blocks 8,16,32,64] [--repeat 3]
    [--memory /dev/shm] [--device cuda] [--transport cuda_ipc] [--limit-s 540] [--out results/tables]

For 7B and 13B: λScale and FaaSNet with every number of blocks, and λScale without verification; for all, if 16 is one of them,
λScale, FaaSNet, NCCL (its communicator apart) and nodes that load their own host copies; on eight GPUs the 70B shape in quarters,
from a node of four GPUs to another whose GPUs receive at once. All else verifies every block. Adds a row for each to
gpu_host.csv, beside the time of its plan at the rate of a copy between two GPUs, measured in this run, and prints a table. Models
that a GPU cannot hold are left out and named; so is what --limit-s has left no time for. NCCL makes its connections with a
communicator's first broadcast, or, with NCCL_RUNTIME_CONNECT=0 in the environment, with the communicator: measured_on says so
then. Models of random weights are packed under --memory, which takes 14, 26 and 138 GB, and twice that for the time of packing;
existing ones are kept. «small» is for rehearsals on CPUs:
--models small --device cpu --transport shm --nodes 4 --groups 2,4 --memory /tmp
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Any, Literal

import pandas as pd
import torch

from lambdascale.calibration import random_models
from lambdascale.calibration.multicast_rates import link_rate, planned_s
from lambdascale.calibration.multicast_runs import CONNECTED, OWN_COPIES, Timed, Trial
from lambdascale.checkpoints import PackedModel, model_spec, parse_architecture
from lambdascale.cli.guard import run_guarded
from lambdascale.cli.multicast import Setting, run_trials
from lambdascale.cli.parser import Parser
from lambdascale.core import MulticastPlan
from lambdascale.experiments.gpu_runs import numbers
from lambdascale.live.forkserver import prepare

ONE_SIDED = ("lambdascale", "faasnet")
USUAL = 16  # blocks of NCCL's and of own copies' rows
QUARTERS = 4
# Of a GPU's memory, what its context, digests and places for KV need besides blocks.
_SPARE_BYTES = 6 << 30
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A packed model, and the clusters that use it one after the other: the systems of each, or OWN_COPIES."""

    model: str
    blocks: int
    clusters: tuple[tuple[str, ...], ...]
    quarters: bool = False
    verify: Literal["full", "off"] = "full"

    @property
    def packed(self) -> str:
        """Model to pack, as random_models names it."""
        return f"{self.model}/{QUARTERS}" if self.quarters else self.model

    def __str__(self) -> str:
        unverified = ", not verified" if self.verify == "off" else ""
        return f"{self.model} in {self.blocks} blocks{unverified}" + (", in quarters" if self.quarters else "")


def jobs(models: list[str], blocks: list[int], gpus: int) -> list[Job]:
    """Return what to pack and run: systems beside each other and unverified, then quarters, then other numbers of blocks."""
    usual = []
    for model in models if USUAL in blocks else ():
        usual.append(Job(model, USUAL, (ONE_SIDED, ("nccl_broadcast",), (OWN_COPIES,))))
        if model not in random_models.LARGE:
            usual.append(Job(model, USUAL, (("lambdascale",),), verify="off"))
    others = [Job(model, n, (ONE_SIDED,)) for model in models for n in blocks if n != USUAL and model not in random_models.LARGE]
    large = [model for model in models if model in random_models.LARGE and gpus == 2 * QUARTERS and USUAL in blocks]
    return [*usual, *(Job(model, USUAL, (("lambdascale",),), quarters=True) for model in large), *others]


def sizes(groups: list[int], sources: list[int], gpus: int) -> list[tuple[int, int]]:
    """Return sources and destinations of every multicast, the largest group first."""
    return [(k, group - k) for group in sorted(groups, reverse=True) if group <= gpus for k in sources if 2 * k <= group]


def trials(
    job: Job, systems: tuple[str, ...], names: list[str], setting: Setting, groups: list[tuple[int, int]], repeat: int
) -> list[tuple[str, Trial]]:
    """Return the trials of a cluster, each with the system that its row names."""
    if job.quarters:
        pair = setting.plan(sources=1, destinations=1, blocks=job.blocks)
        plans = tuple((name, pair.on((index, index + QUARTERS))) for index, name in enumerate(names))
        return [(system, Trial(plans, repeat=repeat)) for system in systems]
    found = []
    for system in systems:
        own = system == OWN_COPIES
        for k, destinations in groups:
            if own and k > 1:
                continue  # nobody sends
            planner = setting if own else replace(setting, system=system)
            plan = planner.plan(sources=k, destinations=destinations, blocks=job.blocks)
            found.append((system, Trial(((names[0], plan),), own_copies=own, repeat=repeat)))
    return found


def row(job: Job, system: str, trial: Trial, timed: Timed, model: PackedModel, rate: float | None) -> Row:
    """Return a row. ``later_s``: median of all multicasts but the first; ``plan_s``: at the rate of the link."""
    plan: MulticastPlan = trial.plans[0][1]
    later = median(timed.seconds[1:] or timed.seconds)
    set_up = median(timed.set_up_s[1:] or timed.set_up_s) if timed.set_up_s else None
    planned = None if rate is None or trial.own_copies else planned_s(plan, model.block_bytes, rate)
    return {
        "model": job.packed,
        "system": system,
        "sources": len(trial.sources),
        "destinations": len(trial.destinations),
        "blocks": job.blocks,
        "verify": job.verify,
        "first_s": timed.seconds[0],
        "later_s": later,
        "set_up_s": set_up,
        "without_set_up_s": None if set_up is None else later - set_up,
        "plan_s": planned,
        "of_plan": None if planned is None else later / planned,
        "link_gb_per_s": None if rate is None else rate / 1e9,
        "gb_per_s": sum(model.block_bytes) * len(trial.destinations) / later / 1e9,
    }


def fits(job: Job) -> bool:
    """Return True if this machine's GPUs can hold the job's model."""
    if not torch.cuda.is_available() or job.model not in random_models.SHAPES | random_models.LARGE:
        return True
    spec = model_spec(parse_architecture(random_models.config(job.packed)), "BF16", job.model)
    arenas = 2 if job.quarters else 1  # a cluster of several models has room for one more than run
    return arenas * spec.size_bytes + _SPARE_BYTES <= torch.cuda.get_device_properties(0).total_memory


def rows_of(job: Job, arguments: argparse.Namespace, gpus: int, model: PackedModel, rate: float | None) -> Iterator[Row]:
    """Run the clusters of a job and yield their rows."""
    names = [f"{model.name}-{index}" for index in range(QUARTERS if job.quarters else 1)]
    groups = sizes(arguments.groups, arguments.sources, gpus)
    for systems in job.clusters:
        system = systems[0] if systems[0] != OWN_COPIES else "lambdascale"
        setting = Setting(system, gpus, arguments.transport, arguments.device, copies=OWN_COPIES in systems, verify=job.verify)
        planned = trials(job, systems, names, setting, groups, arguments.repeat)
        found, _ = run_trials(setting, dict.fromkeys(names, model), [trial for _, trial in planned])
        for (name, trial), timed in zip(planned, found, strict=True):
            yield row(job, name, trial, timed, model, rate)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(random_models.SHAPES | random_models.LARGE), help="(default: %(default)s)")
    parser.add_argument("--groups", type=numbers, default="2,4,8", help="nodes of a multicast (default: %(default)s)")
    parser.add_argument("--sources", type=numbers, default="1,2,4", help="(default: %(default)s)")
    parser.add_argument("--blocks", type=numbers, default="8,16,32,64", help="(default: %(default)s)")
    parser.add_argument("--nodes", type=int, help="(default: the GPUs of this machine)")
    parser.add_argument("--repeat", type=int, default=3, help="multicasts of each setting (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="nodes compute on (default: %(default)s)")
    parser.add_argument(
        "--transport",
        default="cuda_ipc",
        choices=("cuda_ipc", "shm", "tcp"),
        help="way of the blocks between nodes (default: %(default)s)",
    )
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="folder for packed models (default: %(default)s)")
    parser.add_argument(
        "--limit-s", type=float, default=540.0, help="seconds after which no cluster starts (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("results/tables"), help="folder of the tables (default: %(default)s)")
    arguments = parser.parse_args()
    gpus = arguments.nodes or torch.cuda.device_count()
    if gpus < 2:
        parser.error("two GPUs are needed, or --device cpu --transport shm --nodes N")
    card = f"{gpus} CPU processes" if arguments.device == "cpu" else f"{gpus} x {torch.cuda.get_device_name(0)}"
    connected = f"; {CONNECTED}" if os.environ.get("NCCL_RUNTIME_CONNECT") == "0" else ""
    prepare()
    began, rate, rows, left = time.monotonic(), link_rate(arguments.transport), [], []
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "gpu_host.csv"
    before = pd.read_csv(path) if path.exists() else pd.DataFrame()
    for job in jobs(arguments.models.split(","), arguments.blocks, gpus):
        if not fits(job):
            left.append(f"{job}: more than a GPU holds")
            continue
        if time.monotonic() - began > arguments.limit_s:
            left.append(f"{job}: --limit-s was over")
            continue
        models = random_models.packed([job.packed], arguments.memory, job.blocks)
        model = PackedModel.open(models[job.packed])
        for each in rows_of(job, arguments, gpus, model, rate):
            rows.append(each | {"measured_on": f"{card}, torch {torch.__version__}{connected}"})
            pd.concat([before, pd.DataFrame(rows)]).to_csv(path, index=False, float_format="%.4g")
        if job.model in random_models.LARGE:
            rmtree(model.directory)  # two of them exceed memory
        print(f"{time.monotonic() - began:.1f} s: {job}", flush=True)
    table = pd.DataFrame(rows)
    print(table.drop(columns="measured_on", errors="ignore").to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    for line in left:
        print(f"left out: {line}")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
