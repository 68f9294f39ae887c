"""A node's profile: all measurements, with place and time, as a file of conf/cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from lambdascale.calibration import probes
from lambdascale.calibration.iterations import BlockTimes, Grid, loaded, measure_blocks, measure_whole, table
from lambdascale.calibration.sharing import shared_slowdown
from lambdascale.checkpoints import PackedModel
from lambdascale.core import ComputeTable, UserError
from lambdascale.diagnostics.disk import measure as measure_disk
from lambdascale.inference.linear import KERNEL

MIB = 1 << 20
# The default price of ClusterSpec.
_NO_PRICE = 0.0


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """Settings of a measurement. ``nodes`` like this one make the cluster; ``disk``: a directory on the disk; sizes in MiB.

    ``threads`` to compute with, None: torch's default. ``sharing``: also measure how much slower iterations (of the first model)
    are while up to so many processes compute at once, as nodes of a live cluster on one machine do; 1: not measured.
    """

    name: str
    models: tuple[PackedModel, ...]
    device: str = "cpu"
    nodes: int = 4
    disk: Path = Path(".")
    disk_mib: int = 512
    memory_mib: int = 256
    threads: int | None = None
    sharing: int = 1
    grid: Grid = field(default_factory=Grid)


@dataclass(frozen=True)
class Profile:
    """The cluster configuration, and for each model the times of its blocks, or of all together: its table is their sum."""

    cluster: dict[str, Any]
    blocks: dict[str, list[BlockTimes]]
    provenance: str
    grid: Grid


def measure(request: ProfileRequest, say: Callable[[str], None] = lambda what: None) -> Profile:
    """Measure as ``request`` says; ``say(text)`` announces each step. UserError if this machine cannot measure something."""
    device = torch.device(request.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but PyTorch finds no GPU; lambdascale doctor says more")
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    size = request.memory_mib * MIB
    blocks: dict[str, list[BlockTimes]] = {}
    say("disk")
    disk = measure_disk(request.disk, request.disk_mib * MIB)
    say("memory and loopback")
    stream, latency = probes.loopback(size)
    rates = {
        "memory": probes.memory_rate(size, device),
        "copy": probes.copy_rate(size),
        "to_device": probes.host_to_device_rate(size, device),
        "flops": probes.matrix_rate(4096 if device.type == "cuda" else 1024, device, _compute_type(device)),
    }
    tables = []
    for model in request.models:
        say(f"{model.name}: {len(model.blocks)} blocks")
        blocks[model.name] = measure_model(model, request.device, request.grid)
        tables.append(table(model.name, blocks[model.name], request.grid))
    slowdown: tuple[float, ...] = ()
    if request.sharing > 1:
        say(f"up to {request.sharing} processes computing at once")
        slowdown = shared_slowdown(request.models[0], request.sharing, request.threads)
    measured_on = provenance(device)
    cluster = {
        "_target_": "lambdascale.core.ClusterSpec",
        "name": request.name,
        "provenance": measured_on,
        "nodes": request.nodes,
        "gpus_per_node": 1,
        "gpu": {
            "_target_": "lambdascale.core.GpuSpec",
            "name": _device_name(device),
            "memory_bytes": _device_memory(device),
            "hbm_bytes_per_s": rates["memory"],
            "peak_flops": rates["flops"],
        },
        "compute": {
            "_target_": "lambdascale.core.ComputeSpec",
            # The rates above are measured, not from a datasheet: models without a table get all of each rate.
            "flops_efficiency": 1.0,
            "bandwidth_efficiency": 1.0,
            "measured": [plain(t) for t in tables],
            "shared_slowdown": list(slowdown),
        },
        "nic_bytes_per_s": stream,
        "rdma_efficiency": 1.0,
        "collective_efficiency": 1.0,
        "link_latency_s": latency,
        "hop_latency_s": latency,
        "pcie_bytes_per_s": rates["to_device"],
        "ssd_bytes_per_s": max(disk.cold, disk.direct or 0.0),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "usd_per_gpu_hour": _NO_PRICE,
    }
    return Profile(
        cluster, blocks, f"{measured_on}; host copy {rates['copy'] / 1e9:.2f} GB/s; matrix kernel {KERNEL}", request.grid
    )


def measure_model(model: PackedModel, device: str, grid: Grid) -> list[BlockTimes]:
    """Load a model through the block store and time its blocks, on a GPU all of them together."""
    with loaded(model, device) as weights:
        if torch.device(device).type == "cuda":
            return [measure_whole(model.architecture, weights, grid)]
        return measure_blocks(model.architecture, weights, grid)


def write(profile: Profile, out: Path) -> None:
    """Write the configuration in full or not at all, with the measurements of each block in comments."""
    lines = ["# @package cluster", f"# Measured by lambdascale profile. {profile.provenance}."]
    for model, blocks in profile.blocks.items():
        lines.append(f"# {model}, milliseconds: prefill of {profile.grid.prefill_tokens} tokens; then decode of batches of")
        lines.append(f"# {profile.grid.decode_batch}, each at contexts of {profile.grid.contexts} tokens")
        lines += [f"#   {_name(t)}: {ms(t.prefill_s)}; {' | '.join(ms(row) for row in t.decode_s)}" for t in blocks]
    text = "\n".join(lines) + "\n" + yaml.safe_dump(profile.cluster, sort_keys=False)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error


def _name(times: BlockTimes) -> str:
    return "all blocks" if times.block is None else f"block {times.block}"


def ms(values: Sequence[float]) -> str:
    """Return seconds as milliseconds of three digits, in a row."""
    return " ".join(f"{1e3 * value:.3g}" for value in values)


def model_config(model: PackedModel) -> dict[str, Any]:
    """Return a packed model's sizes as the text of a file of conf/model."""
    return {"_target_": "lambdascale.core.ModelSpec", **asdict(model.spec)}


def plain(measured: ComputeTable) -> dict[str, Any]:
    """Return a table as a profile has it."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(measured).items()}
    return {"_target_": "lambdascale.core.ComputeTable", **values}


def _compute_type(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "CPU"


def _device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def provenance(device: torch.device) -> str:
    """Return when and where a measurement is made."""
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"measured {when} on {_device_name(device)} ({os.cpu_count()} cores{threads}), torch {torch.__version__}"
