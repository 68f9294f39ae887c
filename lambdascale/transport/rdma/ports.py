"""Ports of RDMA devices, and the choice of those that a node uses; pure functions."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lambdascale.core import UserError
from lambdascale.transport.rdma.options import MTUS, RdmaOptions

GidType = Literal["IB", "RoCE v1", "RoCE v2"]
NO_DEVICE = (
    "no RDMA device on this machine: load the NIC's driver (mlx5_ib, irdma, ...), or make a software one with "
    "'modprobe rdma_rxe' and 'rdma link add rxe0 type rxe netdev NIC'; 'lambdascale doctor --rdma' tells more"
)


@dataclass(frozen=True, kw_only=True)
class Gid:
    """An address of a port, with its index in the port's GID table."""

    index: int
    kind: GidType
    address: ipaddress.IPv6Address


@dataclass(frozen=True, kw_only=True)
class Port:
    """A port as described by its device. ``mtu`` in bytes; ``rate_bytes_per_s`` is the nominal rate, 0 if unknown."""

    device: str
    number: int
    active: bool
    infiniband: bool
    lid: int
    mtu: int
    rate_bytes_per_s: float
    gids: tuple[Gid, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A port to use, with the address and the packet size (``mtu``, bytes) to use on it."""

    port: Port
    gid: Gid
    mtu: int


def choose(ports: Sequence[Port], options: RdmaOptions, host: str) -> list[Choice]:
    """Choose a port for each named device, in that order, or else the best port. UserError if none is usable.

    A port with the IP address ``host``, the node's own, is preferred, then the fastest.
    """
    if not ports:
        raise UserError(NO_DEVICE)
    if options.devices:
        return [_choice(_best(_of(ports, name), options, host, f"device {name}"), options, host) for name in options.devices]
    return [_choice(_best(ports, options, host, "RDMA device"), options, host)]


def _of(ports: Sequence[Port], device: str) -> list[Port]:
    found = [port for port in ports if port.device == device]
    if not found:
        names = ", ".join(dict.fromkeys(port.device for port in ports))
        raise UserError(f"no RDMA device {device!r} here, only {names}")
    return found


def _best(ports: Sequence[Port], options: RdmaOptions, host: str, what: str) -> Port:
    wanted = [port for port in ports if options.port in (None, port.number)]
    usable = [port for port in wanted if port.active]
    if not wanted:
        raise UserError(f"{what} has no port {options.port}")
    if not usable:
        raise UserError(f"no port of {what} is active: bring its link up ('lambdascale doctor --rdma' shows its state)")
    return max(usable, key=lambda port: (any(_is(gid, host) for gid in port.gids), port.rate_bytes_per_s))


def _choice(port: Port, options: RdmaOptions, host: str) -> Choice:
    mtu = options.mtu or port.mtu
    if mtu > port.mtu:
        raise UserError(f"rdma.mtu {mtu} exceeds the {port.mtu} of {port.device} port {port.number}")
    return Choice(port=port, gid=_gid(port, options.gid_index, host), mtu=mtu)


def _gid(port: Port, index: int | None, host: str) -> Gid:
    if not port.gids:
        raise UserError(f"{port.device} port {port.number} has no GID: give its network interface an IP address")
    if index is None:
        return max(port.gids, key=lambda gid: (*_rank(gid, host), -gid.index))
    for gid in port.gids:
        if gid.index == index:
            return gid
    raise UserError(f"{port.device} port {port.number} has no GID with index {index}: it has {[g.index for g in port.gids]}")


def _rank(gid: Gid, host: str) -> tuple[bool, bool, bool, bool]:
    """Rank of a GID: RoCE v2 above v1, which is not routed; IPv4 above link-local addresses, which may be unreachable."""
    return (_is(gid, host), gid.kind != "RoCE v1", gid.address.ipv4_mapped is not None, not gid.address.is_link_local)


def _is(gid: Gid, host: str) -> bool:
    return host in (str(gid.address), str(gid.address.ipv4_mapped)) and gid.kind != "RoCE v1"


def mtu_code(mtu: int) -> int:
    """Number that verbs use for a packet size in bytes (IBV_MTU_256 is 1)."""
    return MTUS.index(mtu) + 1
