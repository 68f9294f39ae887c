"""``lambdascale profile``: measure this node and write the result as a cluster configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.console import Console

from lambdascale.core import UserError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from lambdascale.checkpoints import PackedModel


def add_parser(subcommands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subcommands.add_parser(
        "profile",
        help="measure this node and write a cluster configuration",
        description="Measure disk, memory, copies from host to device, a loopback connection, and prefill and decode of each "
        "block (on a GPU of all together); write a file for conf/cluster/measured, which simulations use with "
        "cluster=measured/NAME.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="e.g. conf/cluster/measured/NAME.yaml")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="DIR|NAME",
        help="packed model's directory or built-in model's name; repeatable",
    )
    parser.add_argument("--blocks", type=int, metavar="B", help="blocks of a built-in model (default: 16)")
    parser.add_argument("--model-configs", type=Path, metavar="DIR", help="also write a file for conf/model per model into DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to compute on (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=4, metavar="N", help="nodes of the cluster (default: %(default)s)")
    parser.add_argument("--disk", type=Path, default=Path("."), metavar="DIR", help="directory on the disk to measure")
    parser.add_argument("--threads", type=int, metavar="T", help="threads to compute with, as for a node of a live cluster")
    parser.add_argument(
        "--sharing",
        type=int,
        default=1,
        metavar="N",
        help="also measure the slowdown of 2 to N nodes that compute on this machine at once, as in a live cluster",
    )
    parser.add_argument("--quick", action="store_true", help="make fewer and smaller measurements, for a first impression")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write; return the exit status. UserError for a user's mistake."""
    if arguments.out.suffix != ".yaml":
        raise UserError(f"--out must name a .yaml file, not {arguments.out}")
    if arguments.nodes < 1:
        raise UserError(f"--nodes must be at least 1, not {arguments.nodes}")
    if arguments.threads is not None and arguments.threads < 1:
        raise UserError(f"--threads must be at least 1, not {arguments.threads}")
    if arguments.sharing < 1:
        raise UserError(f"--sharing must be at least 1, not {arguments.sharing}")
    if arguments.sharing > 1 and arguments.device != "cpu":
        raise UserError("--sharing measures nodes that share this machine's cores, so it needs --device cpu")
    if not arguments.disk.is_dir():
        raise UserError(f"--disk {arguments.disk} is not a directory")
    # Imported only here: torch takes seconds to import.
    from lambdascale.calibration.iterations import GPU_GRID, Grid
    from lambdascale.calibration.profile import ProfileRequest, measure, model_config, write
    from lambdascale.checkpoints.builtin import open_model

    console = Console(stderr=True)
    quick = Grid(prefill_tokens=(8, 64), decode_batch=(1, 4), contexts=(16, 128), rounds=1)
    with TemporaryDirectory(prefix="lambdascale-profile-") as scratch, console.status("") as status:
        models = [open_model(model, arguments.blocks) for model in arguments.model] or [_small(Path(scratch))]
        request = ProfileRequest(
            name=arguments.out.stem,
            models=tuple(models),
            device=arguments.device,
            nodes=arguments.nodes,
            disk=arguments.disk,
            disk_mib=32 if arguments.quick else 512,
            memory_mib=32 if arguments.quick else 256,
            threads=arguments.threads,
            sharing=arguments.sharing,
            grid=quick if arguments.quick else GPU_GRID if arguments.device == "cuda" else Grid(),
        )
        profile = measure(request, lambda what: status.update(f"measuring {what} ..."))
        write(profile, arguments.out)
        if arguments.model_configs is not None:
            _write_models({model.name: model_config(model) for model in models}, arguments.model_configs)
    cluster = profile.cluster
    for name, unit in (("ssd_bytes_per_s", "disk"), ("pcie_bytes_per_s", "host to device"), ("nic_bytes_per_s", "loopback")):
        print(f"{unit}: {cluster[name] / 1e9:.2f} GB/s")
    for table in cluster["compute"]["measured"]:
        decode = 1e3 * table["decode_s"][0]
        rate = table["prefill_tokens"][-1] / table["prefill_s"][-1]
        print(f"{table['model']}: decode {decode:.2f} ms a token, prefill {rate:.0f} tokens/s")
    if len(cluster["compute"]["shared_slowdown"]) > 1:
        print("while 1, 2, ... compute at once:", ", ".join(f"{times:.2f}" for times in cluster["compute"]["shared_slowdown"]))
    print(f"wrote {arguments.out}; use it with cluster=measured/{arguments.out.stem}")
    return 0


def _small(scratch: Path) -> PackedModel:
    """Pack a random model of 58 million parameters, for users who name no model."""
    from lambdascale.checkpoints import PackedModel, pack
    from lambdascale.checkpoints.synthetic import PRESETS, write_random

    (scratch / "source").mkdir()
    write_random(PRESETS["small"], scratch / "source", seed=0)
    pack(scratch / "source", scratch / "small", 4)
    return PackedModel.open(scratch / "small")


def _write_models(configs: dict[str, dict[str, object]], directory: Path) -> None:
    import yaml

    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, config in configs.items():
            head = "# @package model\n# A packed model's sizes, written by lambdascale profile.\n"
            (directory / f"{name}.yaml").write_text(head + yaml.safe_dump(config, sort_keys=False))
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from error
