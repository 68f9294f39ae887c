"""RDMA devices of a node, opened once, and the memory registered with them."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyverbs.device import Context, get_device_list
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.pyverbs_error import PyverbsError

from lambdascale.core import UserError
from lambdascale.transport.base import TransportError
from lambdascale.transport.rdma.options import MTUS
from lambdascale.transport.rdma.ports import Choice, Gid, GidType, Port
from lambdascale.transport.rdma.verbs import enums

SYSFS = Path("/sys/class/infiniband")
_GBIT = 1e9 / 8
_GID_TYPES: dict[int, GidType] = {
    enums.IBV_GID_TYPE_IB: "IB",
    enums.IBV_GID_TYPE_ROCE_V1: "RoCE v1",
    enums.IBV_GID_TYPE_ROCE_V2: "RoCE v2",
}


class Region:
    """Memory registered with every device of a node. ``origin`` is the address of its first byte for the devices."""

    def __init__(self, address: int, size: int, regions: list[MR], origin: int) -> None:
        self.address, self.size, self.origin = address, size, origin
        self._regions = regions

    @property
    def local_keys(self) -> list[int]:
        """Key of each device for its own access."""
        return [region.lkey for region in self._regions]

    @property
    def remote_keys(self) -> list[int]:
        """Key of each device for its peers' access."""
        return [region.rkey for region in self._regions]

    def of(self, rail: int) -> MR:
        """Registration with one device."""
        return self._regions[rail]

    def has(self, address: int, size: int) -> bool:
        """True if the ``size`` bytes from ``address`` all lie in this region."""
        return self.address <= address and address + size <= self.address + self.size

    def place(self, address: int) -> int:
        """Address that the devices use for ``address`` of this region."""
        return self.origin + address - self.address

    def close(self) -> None:
        """Deregister the memory."""
        for region in self._regions:
            region.close()


class Device:
    """Context and protection domain of the chosen port; TransportError if the device fails to open."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        try:
            self.context = Context(name=choice.port.device)
            self.domain = PD(self.context)
        except PyverbsError as error:
            raise TransportError(f"{choice.port.device} cannot be opened: {error}") from error

    @property
    def has_windows(self) -> bool:
        """True if the device has memory windows of type 2B."""
        attributes = self.context.query_device()
        return attributes.max_mw > 0 and bool(attributes.device_cap_flags & enums.IBV_DEVICE_MEM_WINDOW_TYPE_2B)

    def close(self) -> None:
        """Close the device, after all that uses it has been closed."""
        self.domain.close()
        self.context.close()


def register(
    devices: Sequence[Device],
    address: int,
    size: int,
    *,
    local: bool = False,
    remote: bool = False,
    windows: bool = False,
    make: Callable[[PD, int], MR] | None = None,
    origin: int | None = None,
) -> Region:
    """Register memory for reading by our devices; for their receives too if ``local``, for peers' writes if ``remote``.

    ``windows``: for peers' writes through memory windows only. ``make(domain, access)`` registers memory without a host
    address, whose device addresses start at ``origin``. TransportError on failure (often the limit on locked memory).
    """
    make = make or (lambda domain, access: MR(domain, size, access, address=address))
    access = enums.IBV_ACCESS_LOCAL_WRITE if local or remote or windows else 0
    access |= (enums.IBV_ACCESS_REMOTE_WRITE if remote else 0) | (enums.IBV_ACCESS_MW_BIND if windows else 0)
    regions: list[MR] = []
    try:
        for device in devices:
            regions.append(make(device.domain, access))  # noqa: PERF401 (those made are closed below)
    except PyverbsError as error:
        for region in regions:
            region.close()
        raise TransportError(
            f"{size} bytes cannot be registered for RDMA: {error}; 'ulimit -l' must allow as much as a node's memory"
        ) from error
    return Region(address, size, regions, address if origin is None else origin)


def list_ports(root: Path = SYSFS) -> list[Port]:
    """List all ports of all devices; UserError for a device that this process may not open."""
    try:
        devices = get_device_list()
    except PyverbsError:  # a kernel without RDMA
        return []
    ports = []
    for device in devices:
        name = device.name.decode()
        try:
            with Context(name=name) as context:
                numbers = range(1, context.query_device().phys_port_cnt + 1)
                ports += [_port(name, number, context, root) for number in numbers]
        except PyverbsError as error:
            raise UserError(f"{name} cannot be opened: {error}; 'lambdascale doctor --rdma' tells more") from error
    return ports


def _port(device: str, number: int, context: Context, root: Path) -> Port:
    attributes = context.query_port(number)
    # From the device, not from sysfs, where a table of a thousand mostly empty entries is a thousand files.
    gids = [gid for gid in context.query_gid_table(max(1, attributes.gid_tbl_len)) if gid.port_num == number]
    return Port(
        device=device,
        number=number,
        active=attributes.state == enums.IBV_PORT_ACTIVE,
        infiniband=attributes.link_layer != enums.IBV_LINK_LAYER_ETHERNET,
        lid=attributes.lid,
        mtu=MTUS[attributes.active_mtu - 1],
        rate_bytes_per_s=read_rate(root / device / "ports" / str(number)),
        gids=tuple(
            Gid(index=gid.gid_index, kind=_GID_TYPES[gid.gid_type], address=ipaddress.IPv6Address(gid.gid_str())) for gid in gids
        ),
    )


def read_rate(folder: Path) -> float:
    """Nominal rate of a port in bytes/s, from a file with ``400 Gb/sec (4X NDR)``; 0 if unknown."""
    try:
        words = (folder / "rate").read_text().split()
    except OSError:
        return 0.0
    return float(words[0]) * _GBIT if len(words) > 1 and words[1] == "Gb/sec" else 0.0


def guarded(work: Callable[[], Any]) -> Any:
    """Call verbs while a connection is made, raising their errors as OSError, which SocketEndpoint handles."""
    try:
        return work()
    except PyverbsError as error:
        raise OSError(str(error)) from error
