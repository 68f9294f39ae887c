"""Pre-flight check of the rdma transport: a verified and timed write through every port."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lambdascale.core import UserError
from lambdascale.diagnostics.checks import ROOT, Check, gpudirect, memory_lock, pyverbs, rdma

MIB = 2**20
# A loopback write crosses the NIC twice; below this share of the port's rate, something other than the port is the limit.
_WORTH_A_LOOK = 0.5
_CHECK_LINK = "'ibv_devinfo -v' shows the port, 'dmesg' what its driver says"


def rdma_checks(root: Path = ROOT, mib: int = 64) -> list[Check]:
    """Check everything that ``--transport rdma`` needs, in the order in which it is needed; ``mib`` MiB through every port."""
    checks = [pyverbs(), rdma(root), memory_lock(), *gpu_memory(root)]
    if checks[0].status == checks[1].status == "ok":
        checks += loopbacks(mib)
    return checks


def gpu_memory(root: Path = ROOT) -> list[Check]:
    """Check that RDMA devices can access GPU memory, by nvidia-peermem or by dma-buf; an empty list without a GPU."""
    if not list((root / "dev").glob("nvidia[0-9]*")):
        return []
    peermem = gpudirect(root)
    return [peermem if peermem.status == "ok" else dma_buf(root, os.uname().release)]


def dma_buf(root: Path, release: str) -> Check:
    """Check the requirements of dma-buf: kernel 5.12 or newer, and NVIDIA's open kernel modules."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    recent = numbers is not None and (int(numbers[1]), int(numbers[2])) >= (5, 12)
    driver = root / "proc/driver/nvidia/version"
    is_open = driver.exists() and "Open Kernel Module" in driver.read_text()
    if recent and is_open:
        return Check("GPUDirect", "ok", f"dma-buf (kernel {release}, open NVIDIA kernel modules); nvidia_peermem is not loaded")
    advice = "'modprobe nvidia_peermem' as root on the host, or NVIDIA's open kernel modules with kernel 5.12 or newer"
    return Check("GPUDirect", "missing", "neither nvidia_peermem nor dma-buf: blocks go through host memory", advice)


def loopbacks(mib: int) -> list[Check]:
    """Check every port of every device with a write of ``mib`` MiB."""
    from lambdascale.transport.rdma.device import list_ports

    return [port_check(port.device, port.number, port.active, port.rate_bytes_per_s, mib) for port in list_ports()]


def port_check(device: str, number: int, active: bool, rate_bytes_per_s: float, mib: int) -> Check:
    """Check a port: its GID, its MTU and a write of ``mib`` MiB through it."""
    from lambdascale.transport import TransportError
    from lambdascale.transport.rdma import RdmaOptions
    from lambdascale.transport.rdma.probe import loopback

    name = f"{device} port {number}"
    if not active:
        advice = "bring its link up: the cable, 'ip link set dev NIC up' (RoCE), a subnet manager such as opensm (InfiniBand)"
        return Check(name, "warning", "not active", advice)
    try:
        found = loopback(RdmaOptions(devices=(device,), port=number), mib * MIB)
    except UserError as error:
        return Check(name, "missing", str(error), _CHECK_LINK)
    except (TransportError, OSError) as error:
        return Check(name, "missing", f"a loopback write fails: {error}", _CHECK_LINK)
    gid = found.choice.gid
    address = gid.address.ipv4_mapped or gid.address
    text = f"GID {gid.index} ({gid.kind}, {address}), MTU {found.choice.mtu}; "
    return _judge(name, text, found.bytes_per_s, rate_bytes_per_s, found.intact, mib)


def _judge(name: str, text: str, bytes_per_s: float, rate_bytes_per_s: float, intact: bool, mib: int) -> Check:
    if not intact:
        return Check(name, "missing", f"{text}a loopback write of {mib} MiB is corrupted", "replace the NIC or its driver")
    text += f"a loopback write of {mib} MiB is intact, at {bytes_per_s / 1e9:.2f} GB/s"
    if not rate_bytes_per_s:
        return Check(name, "ok", text)
    share = bytes_per_s / rate_bytes_per_s
    text += f" ({share:.0%} of the port's {rate_bytes_per_s / 1e9:.2f} GB/s)"
    if share >= _WORTH_A_LOOK:
        return Check(name, "ok", text)
    advice = "check the PCIe slot ('lspci -vv', LnkSta), its NUMA node and the MTU; emulated devices are always slow"
    return Check(name, "warning", text, advice)
