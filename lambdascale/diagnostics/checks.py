"""Checks of a live cluster's requirements: one function each, which reads files below ``root`` and returns a Check."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "missing", "warning"]

ROOT = Path("/")
GIB = 2**30
RDMA_ONLY = "(only for --transport rdma)"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: what was found and, unless the status is ok, advice."""

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """Properties of the installed torch. ``error``: the reason if torch is missing or fails to import, else empty."""

    version: str = ""
    threads: int = 0
    """Number of threads torch computes with on the CPU."""
    cuda: str | None = None
    """CUDA version torch was built for; None for a build without CUDA."""
    gpus: tuple[tuple[str, int], ...] = ()
    """Name and memory in bytes of every GPU torch can use."""
    error: str = ""


def machine_checks(root: Path = ROOT) -> list[Check]:
    """Run every check but the disk's, in the order of the report; GPUDirect only if torch sees a GPU."""
    facts = torch_facts()
    checks = [cpu(root), memory(root), torch_build(facts), gpus(facts, root), network(root), rdma(root), memory_lock(), pyverbs()]
    return [*checks, *([gpudirect(root)] if facts.gpus else []), shared_memory(root)]


def size_text(size: int) -> str:
    """Format a number of bytes for people: in MiB below one GiB, else in GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def _read(path: Path) -> str:
    """Text of a small system file; empty if it is missing or unreadable (the speed of a NIC that is down is)."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    """Value of the first ``name: value`` line; empty without one."""
    match = re.search(rf"^{re.escape(name)}[ \t]*:[ \t]*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def cpu(root: Path = ROOT) -> Check:
    """Model, cores this process may use, and the vector instruction sets that matter for inference."""
    info = _read(root / "proc/cpuinfo")
    flags = _field(info, "flags").split()
    wanted = {"avx2": "avx2", "avx512f": "avx512", "amx_tile": "amx"}
    sets = [name for flag, name in wanted.items() if flag in flags]
    cores = len(os.sched_getaffinity(0))
    model = _field(info, "model name") or "unknown model"
    found = f"{model}, {cores} usable core{'s' * (cores != 1)}, {' '.join(sets) or 'none of avx2, avx512, amx'}"
    if flags and not sets:
        return Check(
            "CPU", "warning", found, "inference on this CPU will be slow: use a machine (or virtual CPU model) with AVX2"
        )
    return Check("CPU", "ok", found)


def memory(root: Path = ROOT) -> Check:
    """Total and available memory, and the control group's limit where it is lower than the total."""
    info = _read(root / "proc/meminfo")
    total, available = (_kib(_field(info, name)) for name in ("MemTotal", "MemAvailable"))
    if total is None or available is None:
        return Check("memory", "warning", "unknown", "no readable /proc/meminfo: is /proc mounted?")
    found = f"{size_text(total)} total, {size_text(available)} available"
    limit = cgroup_limit(root)
    if limit is None or limit >= total:
        return Check("memory", "ok", found)
    advice = "all processes of the cluster share this limit: raise it with docker run --memory, or MemoryMax= under systemd"
    return Check("memory", "warning", f"{found}; control group limit {size_text(limit)}", advice)


def _kib(value: str) -> int | None:
    """Bytes from ``123 kB`` as /proc/meminfo writes it."""
    match = re.fullmatch(r"(\d+) kB", value)
    return int(match[1]) * 1024 if match else None


def cgroup_limit(root: Path = ROOT) -> int | None:
    """Lowest memory limit in bytes of this process's control group and its parents (version 1 or 2); None if unlimited."""
    limits = (_read(path) for path in _limit_files(root))
    return min((int(limit) for limit in limits if limit.isdecimal()), default=None)


def _limit_files(root: Path) -> Iterator[Path]:
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        top, name = root / "sys/fs/cgroup", "memory.max"
        if "memory" in controllers.split(","):
            top, name = top / "memory", "memory.limit_in_bytes"
        elif controllers:
            continue
        here = top / group.lstrip("/")
        yield from (folder / name for folder in (here, *here.parents) if folder.is_relative_to(top))


def torch_facts() -> TorchFacts:
    """Query the installed torch; imported here only, since the import takes seconds."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return TorchFacts(error="not installed")
    try:
        import torch
    except (ImportError, OSError) as error:
        return TorchFacts(version, error=f"cannot be imported: {_first_line(error)}")
    usable = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    properties = [torch.cuda.get_device_properties(index) for index in usable]
    found = tuple((str(each.name), int(each.total_memory)) for each in properties)
    return TorchFacts(version, torch.get_num_threads(), torch.version.cuda, found)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def torch_build(facts: TorchFacts) -> Check:
    """Version, threads and kind of the installed torch."""
    if facts.error:
        advice = "reinstall it: pip install --force-reinstall -c constraints.txt torch"
        return Check("torch", "missing", f"{facts.version} {facts.error}".strip(), advice)
    build = f"built for CUDA {facts.cuda}" if facts.cuda else "no CUDA in this build"
    return Check("torch", "ok", f"{facts.version}, {facts.threads} threads, {build}")


def gpus(facts: TorchFacts, root: Path = ROOT) -> Check:
    """GPUs torch can use; for those it cannot use, advice on the torch or driver to install."""
    if facts.gpus:
        return Check(
            "GPUs", "ok", "; ".join(f"{index}: {name}, {size_text(size)}" for index, (name, size) in enumerate(facts.gpus))
        )
    devices = sorted((root / "dev").glob("nvidia[0-9]*"))
    if not devices:
        advice = "only to run models on GPUs: install the NVIDIA driver, or start the container with docker run --gpus all"
        return Check("GPUs", "missing", "none", advice)
    found = f"{len(devices)} NVIDIA device{'s' * (len(devices) != 1)} in /dev"
    if facts.cuda:
        advice = f"update the driver to one that runs CUDA {facts.cuda}, or install a torch for an older CUDA: {_torch_for(root)}"
        return Check("GPUs", "warning", f"{found}, but torch cannot use them", advice)
    return Check("GPUs", "warning", f"{found}, but no torch with CUDA", f"install a torch with CUDA: {_torch_for(root)}")


def _torch_for(root: Path) -> str:
    """Pip command that fits the NVIDIA driver: CUDA 13 needs driver 580 or newer, CUDA 12 needs 525."""
    match = re.search(r"\s(\d{3})\.\d+", _read(root / "proc/driver/nvidia/version"))
    newest = "pip install --force-reinstall -c constraints.txt torch --index-url https://download.pytorch.org/whl/cu130"
    if match and int(match[1]) >= 580:
        return newest
    if match and int(match[1]) >= 525:
        return newest.replace("cu130", "cu126")
    return f"{newest} with driver 580 or newer (nvidia-smi shows it), .../whl/cu126 with 525 or newer"


def network(root: Path = ROOT) -> Check:
    """Network interfaces except loopback: name, state and speed (Mbit/s, if the driver reports it)."""
    cards = [folder for folder in _folders(root / "sys/class/net") if folder.name != "lo"]
    if not cards:
        return Check(
            "network", "missing", "loopback only", "only for clusters of several machines: give this one a network interface"
        )
    states = [_read(card / "operstate") or "unknown" for card in cards]
    found = "; ".join(f"{card.name} {state}{_speed(card)}" for card, state in zip(cards, states, strict=True))
    if set(states) <= {"down", "lowerlayerdown", "dormant", "notpresent"}:
        return Check("network", "warning", found, "no interface is up: check the cable, then 'ip link set dev NAME up'")
    return Check("network", "ok", found)


def _speed(card: Path) -> str:
    speed = _read(card / "speed")
    return f" {speed} Mbit/s" if speed.isdecimal() and int(speed) > 0 else ""


def rdma(root: Path = ROOT) -> Check:
    """Ports of RDMA devices: state, rate and link layer; a warning if programs cannot open the devices or no port is active."""
    ports = [port for device in _folders(root / "sys/class/infiniband") for port in _folders(device / "ports")]
    if not ports:
        advice = f"'modprobe rdma_rxe', 'rdma link add rxe0 type rxe netdev NIC' (Soft-RoCE), or the NIC's driver {RDMA_ONLY}"
        return Check("RDMA devices", "missing", "none", advice)
    found = "; ".join(f"{port.parent.parent.name} port {port.name}: {_port_text(port)}" for port in ports)
    if not any((root / "dev/infiniband").glob("uverbs*")):
        advice = f"'modprobe ib_uverbs', or docker run --device /dev/infiniband {RDMA_ONLY}"
        return Check("RDMA devices", "warning", f"{found}; no /dev/infiniband/uverbs*", advice)
    if not any(_port_state(port) == "ACTIVE" for port in ports):
        return Check("RDMA devices", "warning", found, f"no port is active: bring its network interface up {RDMA_ONLY}")
    return Check("RDMA devices", "ok", found)


def _port_state(port: Path) -> str:
    """State of a port: ``ACTIVE`` from the file's ``4: ACTIVE``."""
    return _read(port / "state").rpartition(":")[2].strip()


def _port_text(port: Path) -> str:
    parts = (_port_state(port), _read(port / "rate"), _read(port / "link_layer"))
    return ", ".join(part or "unknown" for part in parts)


def memory_lock(limits: tuple[int, int] | None = None) -> Check:
    """Limit on the memory a process may lock, which RDMA does with its buffers.

    ``limits``: soft and hard limit in bytes (default: those of this process).
    """
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("memory lock limit", "ok", "unlimited")
    if soft >= GIB:
        return Check("memory lock limit", "ok", size_text(soft))
    here = "'ulimit -l unlimited' in this shell" + ("" if hard == resource.RLIM_INFINITY else " (as root)")
    advice = f"{here}, 'memlock unlimited' in /etc/security/limits.conf, or docker run --ulimit memlock=-1 {RDMA_ONLY}"
    return Check("memory lock limit", "warning", size_text(soft), advice)


def pyverbs(module: str = "pyverbs.device") -> Check:
    """Python binding of RDMA verbs: its origin, or the reason why it fails to import."""
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError:
        advice = (
            "the distribution's python3-pyverbs, its folder linked into the venv's site-packages (same Python version), or "
            "pip install 'lambdascale[rdma]' where rdma-core is as new as PyPI's pyverbs"
        )
        return Check("pyverbs", "missing", "not installed", f"{advice} {RDMA_ONLY}")
    except (ImportError, OSError) as error:
        # PyPI's pyverbs needs symbols of its own version of rdma-core.
        needed = re.search(r"IBVERBS_PRIVATE_(\d+)", str(error))
        advice = f"install the libraries pyverbs is linked with (libibverbs1, librdmacm1, ibverbs-providers) {RDMA_ONLY}"
        if needed:
            advice = f"upgrade rdma-core to {needed[1]}, or use the distribution's python3-pyverbs {RDMA_ONLY}"
        return Check("pyverbs", "warning", f"cannot be imported: {_first_line(error)}", advice)
    return Check("pyverbs", "ok", origin(Path(loaded.__file__ or "")))


def origin(file: Path) -> str:
    """Installer of a module, inferred from its file: a distribution below /usr/lib, pip in other package folders."""
    file = file.resolve()
    if file.is_relative_to("/usr/lib") or file.is_relative_to("/usr/lib64"):
        return "the distribution's python3-pyverbs"
    return "from PyPI" if {"site-packages", "dist-packages"} & set(file.parts) else f"from {file.parent}"


def gpudirect(root: Path = ROOT) -> Check:
    """Kernel module that lets RDMA devices access GPU memory: loaded or missing."""
    modules = {line.split(" ", 1)[0] for line in _read(root / "proc/modules").splitlines()}
    loaded = sorted(modules & {"nvidia_peermem", "nv_peer_mem"})
    if loaded:
        return Check("GPUDirect", "ok", f"{loaded[0]} loaded")
    return Check(
        "GPUDirect", "missing", "nvidia_peermem not loaded", f"'modprobe nvidia_peermem' as root, on the host {RDMA_ONLY}"
    )


def shared_memory(root: Path = ROOT) -> Check:
    """Size and free space of /dev/shm."""
    try:
        space = os.statvfs(root / "dev/shm")
    except OSError:
        return Check("shared memory", "missing", "no /dev/shm", "'mount -t tmpfs tmpfs /dev/shm' as root")
    free = space.f_bavail * space.f_frsize
    found = f"{size_text(space.f_blocks * space.f_frsize)}, {size_text(free)} free"
    if free < GIB:
        return Check(
            "shared memory", "warning", found, "remove old files, 'mount -o remount,size=8G /dev/shm' or docker run --shm-size=8g"
        )
    return Check("shared memory", "ok", found)
