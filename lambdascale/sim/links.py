"""Links as fluid flows: max-min fair shares of port rates (progressive filling, Bertsekas and Gallager, Data Networks, 6.5.2).

A flow crosses one or more ports at one rate: the sender's and the receiver's side of their NICs, PCIe, SSD, or all the hops of a
streaming broadcast. Where bytes on one port are worth more or less than on another (line rate and goodput), the flow has weights.
When flows come or go, only those that share ports with them, directly or through others, are
re-shared; a flow that has its ports for itself costs one kernel entry.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import repeat
from math import inf
from operator import attrgetter

from msgspec import Struct

from lambdascale.core import NodeId
from lambdascale.sim.kernel import Kernel

_EVEN = repeat(1.0)
Done = Callable[[], float | None]


class Port:
    """One direction of a link, or a device: ``bytes_per_s`` shared by the flows that cross it."""

    __slots__ = ("bytes_per_s", "flows", "name")

    def __init__(self, name: str, bytes_per_s: float) -> None:
        assert bytes_per_s > 0, f"port {name} has no rate"
        self.name = name
        self.bytes_per_s = bytes_per_s
        self.flows: dict[Flow, None] = {}


class FlowGroup:
    """The flows a command has under way, each with the nodes it depends on."""

    def __init__(self) -> None:
        self.flows: dict[Flow, Collection[NodeId]] = {}
        self.cancelled = False


class Flow(Struct, eq=False):
    """Bytes on their way over some ports. ``rate`` is its present share, ``remaining`` the bytes left at ``settled_s``.

    Of its i-th port it takes ``weights[i]`` times its rate; None: its rate of each. ``group``: the group, if any, that holds the
    flow until it has completed. ``on_done``: see LinkNetwork.start. ``version``: of the kernel entry that ends it.
    """

    flow_id: int
    ports: tuple[Port, ...]
    remaining: float
    on_done: Done
    cap: float
    group: FlowGroup | None
    weights: tuple[float, ...] | None
    settled_s: float
    in_parts: bool
    rate: float = 0.0
    version: int = 0


class Grant(Struct, frozen=True, gc=False):
    """A flow went at ``rate`` bytes/s from ``begin_s`` to ``end_s``, and had ``weights[i]`` times that of ``ports[i]``."""

    flow_id: int
    ports: tuple[str, ...]
    begin_s: float
    end_s: float
    rate: float
    cap: float
    weights: tuple[float, ...]


class LinkNetwork:
    """All flows of a cluster. ``grants`` records every share given, if asked for."""

    def __init__(self, kernel: Kernel, *, record_grants: bool = False) -> None:
        self._kernel = kernel
        self._next_id = 0
        self.grants: list[Grant] | None = [] if record_grants else None

    def start(
        self,
        ports: tuple[Port, ...],
        size_bytes: float,
        on_done: Done,
        cap: float = inf,
        group: FlowGroup | None = None,
        weights: tuple[float, ...] | None = None,
        *,
        in_parts: bool = False,
    ) -> Flow:
        """Begin a flow of ``size_bytes`` at most ``cap`` bytes/s fast; ``on_done()`` is called when the last byte is through.

        ``in_parts``: ``on_done`` returns the bytes of a flow that takes its place, None behind the last; it begins nothing itself
        on these ports. ``group``, ``weights``: see Flow.
        """
        assert ports, "a flow crosses at least one port"
        assert 0 <= size_bytes < inf, f"a flow of {size_bytes} bytes"
        assert cap > 0, f"a flow at most {cap} bytes/s fast"
        flow = Flow(0, ports, size_bytes, on_done, cap, group, weights, 0.0, in_parts)
        self._enter(flow)
        return flow

    def _enter(self, flow: Flow) -> None:
        """Number a flow, put it on its ports and share them."""
        self._next_id = flow.flow_id = self._next_id + 1
        flow.settled_s = self._kernel.now
        alone, rate = True, flow.cap
        for port, weight in zip(flow.ports, flow.weights or _EVEN):  # noqa: B905 - _EVEN has no end
            flows = port.flows
            if flows:
                alone = False
            flows[flow] = None
            most = port.bytes_per_s / weight
            if most < rate:
                rate = most
        if alone:
            self._grant(flow, rate)
        else:
            self._share(flow.ports)

    def cancel(self, flow: Flow) -> None:
        """Take a flow off its ports; it never completes. Nothing happens if it has completed."""
        if flow in flow.ports[0].flows:
            self._leave(flow)

    def set_rate(self, port: Port, bytes_per_s: float) -> None:
        """Change a port's rate; the flows that cross it are shared anew."""
        assert bytes_per_s > 0, f"port {port.name} has no rate"
        port.bytes_per_s = bytes_per_s
        self._share((port,))

    def _leave(self, flow: Flow) -> None:
        if self.grants is not None:
            self._settle(flow)
        flow.version += 1
        crowded = False
        for port in flow.ports:
            del port.flows[flow]
            if port.flows:
                crowded = True
        if crowded:
            self._share(flow.ports)

    def _finish(self, entry: tuple[Flow, int]) -> None:
        flow, version = entry
        if flow.version != version:
            return
        if flow.in_parts:
            self._finish_part(flow, entry)
            return
        self._leave(flow)
        if flow.group is not None:
            del flow.group.flows[flow]
        flow.on_done()

    def _finish_part(self, flow: Flow, entry: tuple[Flow, int]) -> None:
        """Let the next part take a part's place. By itself on its ports, its rate is the same, and it need not leave them."""
        alone = self.grants is None
        for port in flow.ports:
            if len(port.flows) > 1:
                alone = False
        if not alone:
            self._leave(flow)
        size_bytes = flow.on_done()
        if size_bytes is None:
            if alone:
                self._leave(flow)
            if flow.group is not None:
                del flow.group.flows[flow]
        elif alone:
            kernel = self._kernel
            self._next_id = flow.flow_id = self._next_id + 1
            flow.remaining, flow.settled_s = size_bytes, kernel.now
            kernel.at(kernel.now + size_bytes / flow.rate, self._finish, entry)  # the flow has no other
        else:
            flow.remaining, flow.rate = size_bytes, 0.0
            self._enter(flow)

    def _settle(self, flow: Flow) -> None:
        now = self._kernel.now
        if now > flow.settled_s:
            if self.grants is not None and flow.rate > 0:
                names = tuple(port.name for port in flow.ports)
                weights = flow.weights or (1.0,) * len(names)
                self.grants.append(Grant(flow.flow_id, names, flow.settled_s, now, flow.rate, flow.cap, weights))
            flow.remaining = max(0.0, flow.remaining - flow.rate * (now - flow.settled_s))
            flow.settled_s = now

    def _grant(self, flow: Flow, rate: float) -> None:
        flow.rate = rate
        flow.version = version = flow.version + 1
        kernel = self._kernel
        kernel.at(kernel.now + flow.remaining / rate, self._finish, (flow, version))

    def _share(self, ports: tuple[Port, ...]) -> None:
        """Give the flows connected to ``ports`` their fair rates; those whose rate stays keep their completion time."""
        rates = _fair_rates(_connected(ports))
        for flow, rate in rates:
            if rate != flow.rate:
                self._settle(flow)
                self._grant(flow, rate)


def _connected(ports: tuple[Port, ...]) -> list[Flow]:
    """Flows that share ports with ``ports``, directly or through other flows, in the order of their ids."""
    found: dict[Flow, None] = {}
    seen = set(ports)
    todo = list(seen)
    while todo:
        for flow in todo.pop().flows:
            if flow not in found:
                found[flow] = None
                fresh = [port for port in flow.ports if port not in seen]
                seen.update(fresh)
                todo.extend(fresh)
    return sorted(found, key=attrgetter("flow_id"))


def _fair_rates(flows: list[Flow]) -> list[tuple[Flow, float]]:
    """Progressive filling: fix the flows of the tightest port (or the tightest cap), take their rates off, repeat."""
    left: dict[Port, float] = {}
    count: dict[Port, int] = {}
    weighed: dict[Port, float] = {}  # what the open flows together take of a port for each byte/s of their common rate
    for flow in flows:
        for port, weight in _weights(flow):
            left.setdefault(port, port.bytes_per_s)
            count[port] = count.get(port, 0) + 1
            weighed[port] = weighed.get(port, 0.0) + weight
    rates: list[tuple[Flow, float]] = []
    open_flows = flows
    while open_flows:
        share = min(left[port] / weighed[port] for port, users in count.items() if users)
        capped = [flow for flow in open_flows if flow.cap <= share]
        tight = {port for port, users in count.items() if users and left[port] / weighed[port] <= share}
        fixed = capped or [flow for flow in open_flows if not tight.isdisjoint(flow.ports)]
        for flow in fixed:
            rate = min(flow.cap, share)
            rates.append((flow, rate))
            for port, weight in _weights(flow):
                left[port] = max(0.0, left[port] - rate * weight)
                count[port] -= 1
                weighed[port] -= weight
        done = {flow.flow_id for flow in fixed}
        open_flows = [flow for flow in open_flows if flow.flow_id not in done]
    return rates


def _weights(flow: Flow) -> Iterable[tuple[Port, float]]:
    return zip(flow.ports, flow.weights or _EVEN)  # noqa: B905 - _EVEN has no end
