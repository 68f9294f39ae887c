"""Measure multicasts, bursts and traces on all GPUs of a host in one call, and compare them with the simulator.

python scripts/gpu_all.py [--models 7B,13B] [--parts multicasts,bursts,traces,blocks,large,errors] [--limit-s 560]
    [--nodes N] [--profile NAME] [--traces DIR] [--memory /dev/shm] [--device cuda] [--transport cuda_ipc]
    [--out results/tables]

One node process runs on each GPU. Parts, in this order; each begins while time is left, and has its share of it:

- multicasts: gpu_host.py in 16 blocks, groups of 2, 4 and 8 with 1, 2 and 4 sources, all systems;
- bursts: gpu_bursts.py, λScale with pipelines and without, and the others, unpaced and at 400, 100 and 25 Gb/s;
- traces: gpu_figures.py, figures 8 to 11 for all systems; runs that the tables have are not repeated;
- blocks: gpu_host.py in 8, 32 and 64 blocks;
- large: gpu_host.py with the 70B shape, on eight GPUs also in quarters between two nodes of four;
- errors: gpu_sim_errors.py and gpu_figures.py --compare on a profile that was measured before, which nothing is refit to, and
  figures.py --only gpu_live. It needs no GPU.

The scripts print their tables and write them under --out, each row with its machine. The last lines name what was left out for
lack of time and what failed: call again with --parts. «large» needs four minutes, most of them to pack 138 GB. Multicasts can
be rehearsed on CPUs; bursts and traces come too fast for those:
--device cpu --transport shm --nodes 4 --memory /tmp --profile h200 --parts multicasts --models small
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lambdascale.calibration.random_models import SHAPES, packed
from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser
from lambdascale.core.checks import require
from lambdascale.experiments.gpu_runs import profile_of
from lambdascale.transport.cuda import count_gpus

HERE = Path(__file__).resolve().parent
BLOCKS = 16
# Seconds below which a command is not begun: a cluster takes half of them to start, and packing the 70B shape minutes.
LEAST_S, LARGE_S = 30.0, 240.0
# Seconds kept for the comparisons.
ERRORS_S = 60.0
LINKS = "none,400Gb/s,100Gb/s,25Gb/s"
SYSTEMS = "lambdascale,faasnet,nccl_broadcast,serverlessllm"


@dataclass(frozen=True)
class Part:
    """Commands that have ``share`` parts of the time, one after the other; None: they are not limited.

    ``least_s``: seconds below which none is begun.
    """

    name: str
    share: float | None
    commands: tuple[tuple[str, ...], ...]
    least_s: float = LEAST_S


def parts(arguments: argparse.Namespace, nodes: int) -> list[Part]:
    """Return all parts with their commands, without limits of time."""
    models, out, profile = arguments.models.split(","), str(arguments.out), ("--profile", arguments.profile)
    machine = ("--nodes", str(nodes), "--device", arguments.device, "--transport", arguments.transport, "--out", out)
    memory = ("--memory", str(arguments.memory))
    host = ("gpu_host.py", *machine, *memory, "--models")
    bursts = ("gpu_bursts.py", *machine, "--cluster", f"measured/{arguments.profile}", "--links", LINKS, "--systems", SYSTEMS)
    folders = [str(arguments.memory / model) if model in SHAPES else model for model in models]
    traces = ("gpu_figures.py", *machine, *memory, *profile, "--traces", str(arguments.traces), "--models", arguments.models)
    errors = (
        ("gpu_sim_errors.py", *profile, "--card", arguments.profile.upper(), "--tables", out),
        ("gpu_figures.py", "--compare", *profile, "--out", out),
        ("figures.py", "--only", "gpu_live", "--tables", out, "--out", str(arguments.out.parent / "figures")),
    )
    return [
        Part("multicasts", 3, ((*host, arguments.models, "--blocks", str(BLOCKS)),)),
        Part("bursts", 4, tuple((*bursts, "--model", folder) for folder in folders)),
        Part("traces", 3, (traces,)),
        Part("blocks", 1, ((*host, arguments.models, "--blocks", "8,32,64"),)),
        Part("large", 3, ((*host, "70B", "--blocks", str(BLOCKS)),), least_s=LARGE_S),
        Part("errors", None, errors),
    ]


def allowed_s(left_s: float, part: Part, later: Sequence[Part]) -> float:
    """Return the seconds of ``left_s`` that a part may take, by its share and those of ``later`` parts."""
    if part.share is None:
        return left_s
    kept = ERRORS_S if any(each.share is None for each in later) else 0.0
    return max(0.0, left_s - kept) * part.share / (part.share + sum(each.share or 0.0 for each in later))


def name_models(models: Sequence[str], memory: Path) -> None:
    """Pack models of known shapes once, all at a time, and name their folders by their shapes."""
    for model, folder in packed([model for model in models if model in SHAPES], memory, BLOCKS).items():
        link = memory / model
        if link.is_symlink():
            link.unlink()
        require(not link.exists(), f"{link} exists: choose another folder with --memory")
        link.symlink_to(folder.resolve())


def card_name() -> str:
    """Return the name of this machine's first GPU."""
    import torch

    return torch.cuda.get_device_name(0)


def carry_out(chosen: Sequence[Part], limit_s: float) -> tuple[list[str], list[str]]:
    """Run the parts; return the commands that were left out for lack of time, and those that failed."""
    began, left_out, failed = time.monotonic(), [], []
    for place, part in enumerate(chosen):
        ends = time.monotonic() + allowed_s(began + limit_s - time.monotonic(), part, chosen[place + 1 :])
        for index, command in enumerate(part.commands):
            shown = f"{part.name}: {' '.join(command)}"
            share_s = (ends - time.monotonic()) / (len(part.commands) - index)
            if part.share is not None and share_s < part.least_s:
                left_out.append(shown)
                continue
            limit = () if part.share is None else ("--limit-s", f"{share_s:.0f}")
            print(f"== {time.monotonic() - began:.0f} s: {shown} {' '.join(limit)}".rstrip(), flush=True)
            if subprocess.run([sys.executable, str(HERE / command[0]), *command[1:], *limit], check=False).returncode:
                failed.append(shown)
    return left_out, failed


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(SHAPES), help="(default: %(default)s)")
    parser.add_argument("--parts", help="some of them, by name (default: all)")
    parser.add_argument("--limit-s", type=float, default=560.0, help="seconds for all parts (default: %(default)s)")
    parser.add_argument("--nodes", type=int, help="(default: the GPUs of this machine)")
    parser.add_argument("--profile", metavar="NAME", help="of conf/cluster/measured (default: the card's)")
    traces = Path(os.environ.get("LAMBDASCALE_TRACES", "data/traces"))
    parser.add_argument("--traces", type=Path, default=traces, metavar="DIR", help="folder of the authors' trace")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="folder for packed models (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="nodes compute on (default: %(default)s)")
    parser.add_argument("--transport", default="cuda_ipc", help="way of the blocks between nodes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/tables"), help="folder of the tables (default: %(default)s)")
    arguments = parser.parse_args()
    nodes = arguments.nodes or count_gpus()
    if arguments.profile is None:
        if arguments.device == "cpu" or not count_gpus():
            parser.error("without a GPU --profile is needed: decisions follow a card's rates")
        arguments.profile = profile_of(card_name())
    every = {part.name: part for part in parts(arguments, nodes)}
    names = list(every) if arguments.parts is None else arguments.parts.split(",")
    unknown = [name for name in names if name not in every]
    if unknown:
        parser.error(f"--parts: no part is named {unknown[0]}: {', '.join(every)}")
    if nodes < 2 and names != ["errors"]:
        parser.error("two GPUs are needed, or --device cpu --transport shm --nodes N")
    began = time.monotonic()
    if {"multicasts", "bursts", "traces"} & set(names):
        name_models(arguments.models.split(","), arguments.memory)
    chosen = [part for part in every.values() if part.name in names]
    left_out, failed = carry_out(chosen, arguments.limit_s - (time.monotonic() - began))
    for line in left_out:
        print(f"left out for lack of time: {line}")
    for line in failed:
        print(f"FAILED: {line}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(run_guarded(main))
