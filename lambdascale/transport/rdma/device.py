"""An RDMA device that a node uses: opened once, with the memory that is registered with it."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from pyverbs import enums
from pyverbs.device import Context, get_device_list
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.pyverbs_error import PyverbsError

from lambdascale.transport.base import TransportError
from lambdascale.transport.rdma.options import MTUS
from lambdascale.transport.rdma.ports import Choice, Gid, GidType, Port

SYSFS = Path("/sys/class/infiniband")
_GBIT = 1e9 / 8


class Region:
    """Memory registered with every device of a node."""

    def __init__(self, address: int, size: int, regions: list[MR]) -> None:
        self.address, self.size = address, size
        self._regions = regions

    @property
    def local_keys(self) -> list[int]:
        """For each device."""
        return [region.lkey for region in self._regions]

    @property
    def remote_keys(self) -> list[int]:
        """For each device."""
        return [region.rkey for region in self._regions]

    def has(self, address: int, size: int) -> bool:
        """Whether all of it lies in here."""
        return self.address <= address and address + size <= self.address + self.size

    def close(self) -> None:
        """Register it no longer."""
        for region in self._regions:
            region.close()


class Device:
    """A context and protection domain of the chosen port."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        try:
            self.context = Context(name=choice.port.device)
            self.domain = PD(self.context)
        except PyverbsError as error:
            raise TransportError(f"{choice.port.device} cannot be opened: {error}") from error

    def close(self) -> None:
        """All that uses it has been closed before."""
        self.domain.close()
        self.context.close()


def register(devices: Sequence[Device], address: int, size: int, *, local: bool = False, remote: bool = False) -> Region:
    """Register memory: to be read by our devices, for their receives if ``local``, for peers' writes if ``remote``.

    TransportError where it cannot be (the limit on locked memory).
    """
    access = enums.IBV_ACCESS_LOCAL_WRITE if local or remote else 0
    access |= enums.IBV_ACCESS_REMOTE_WRITE if remote else 0
    regions: list[MR] = []
    try:
        for device in devices:
            regions.append(MR(device.domain, size, access, address=address))  # noqa: PERF401 (what was made is closed below)
    except PyverbsError as error:
        for region in regions:
            region.close()
        raise TransportError(
            f"{size} bytes cannot be registered for RDMA: {error}; 'ulimit -l' must allow as much as a node's memory"
        ) from error
    return Region(address, size, regions)


def list_ports(root: Path = SYSFS) -> list[Port]:
    """All ports of all devices that this process may open."""
    ports = []
    for device in get_device_list():
        name = device.name.decode()
        with Context(name=name) as context:
            count = context.query_device().phys_port_cnt
            ports += [_port(name, number, context.query_port(number), root) for number in range(1, count + 1)]
    return ports


def _port(device: str, number: int, attributes: Any, root: Path) -> Port:
    folder = root / device / "ports" / str(number)
    infiniband = attributes.link_layer != enums.IBV_LINK_LAYER_ETHERNET
    return Port(
        device=device,
        number=number,
        active=attributes.state == enums.IBV_PORT_ACTIVE,
        infiniband=infiniband,
        lid=attributes.lid,
        mtu=MTUS[attributes.active_mtu - 1],
        rate_bytes_per_s=read_rate(folder),
        gids=tuple(read_gids(folder, infiniband)),
    )


def read_rate(folder: Path) -> float:
    """A port's labelled rate in bytes/s: its file says ``400 Gb/sec (4X NDR)``. 0 if it says nothing."""
    words = _read(folder / "rate").split()
    return float(words[0]) * _GBIT if len(words) > 1 and words[1] == "Gb/sec" else 0.0


def read_gids(folder: Path, infiniband: bool) -> list[Gid]:
    """A port's addresses; empty entries of the table are left out."""
    gids = []
    for path in sorted((folder / "gids").glob("*"), key=lambda path: int(path.name)):
        address = ipaddress.IPv6Address(_read(path) or "::")
        kind = _read(folder / "gid_attrs" / "types" / path.name)
        if int(address) & (1 << 64) - 1:
            gids.append(Gid(index=int(path.name), kind=_kind(kind, infiniband), address=address))
    return gids


def _kind(text: str, infiniband: bool) -> GidType:
    if infiniband:
        return "IB"
    return cast(GidType, text) if text == "RoCE v2" else "RoCE v1"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # an entry of the table that is not in use
        return ""


def guarded(work: Callable[[], Any]) -> Any:
    """Call verbs while a connection is made: their errors as OSError, which SocketEndpoint knows."""
    try:
        return work()
    except PyverbsError as error:
        raise OSError(str(error)) from error
