"""One queue pair of a connection with its completion queue: work requests go in, completions come out in batches.

The pyverbs objects of work requests are reused, since pyverbs never frees their memory.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ, CompChannel
from pyverbs.mr import MW, MWBindInfo
from pyverbs.pyverbs_error import PyverbsError
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

from lambdascale.transport.rdma.device import Device, Region
from lambdascale.transport.rdma.frames import RailCard, Receives
from lambdascale.transport.rdma.ports import mtu_code
from lambdascale.transport.rdma.verbs import enums

_BATCH = 32
# An unacknowledged packet is sent again after 4.096 us * 2**17 = 0.54 s, six times (for rxe, seven means without limit), so that
# a silent peer is lost after about four seconds; the death of its process is seen at once, by the socket. For receives that are
# not posted in time, the NIC waits without limit (7).
_ACK_TIMEOUT, _RETRIES, _RNR_RETRIES, _RNR_TIMER = 17, 6, 7, 12
_HOPS = 64
_PSN_BITS = 24
_REASONS = {
    "IBV_WC_RETRY_EXC_ERR": "it does not answer any more (retries exceeded)",
    "IBV_WC_REM_ACCESS_ERR": "it refuses a write (remote access error)",
    "IBV_WC_WR_FLUSH_ERR": "its queue pair has failed (flushed)",
    "IBV_WC_RNR_RETRY_EXC_ERR": "it posts no receives (retries exceeded)",
}
# Held while a completion channel is opened: its descriptor is the one that did not exist before.
_opening = threading.Lock()


@dataclass(frozen=True, slots=True)
class Arrival:
    """A completed receive: of a write's immediate, or of a send of ``size`` bytes into a slot."""

    slot: int
    size: int
    immediate: int | None


class LaneError(RuntimeError):
    """A failure of the queue pair; the message gives the reason, with the peer as «it»."""


@dataclass(slots=True)
class _Posted:
    number: int
    at: float
    chunk: bool
    done: Callable[[], None] | None


class Window:
    """A memory window of type 2 that one peer may write through, once it is bound. ``request`` binds it."""

    def __init__(self, device: Device, region: Region, rail: int) -> None:
        self._window = MW(device.domain, enums.IBV_MW_TYPE_2)
        self._info = MWBindInfo(region.of(rail), region.origin, region.size, enums.IBV_ACCESS_REMOTE_WRITE)
        self.request = SendWR(opcode=enums.IBV_WR_BIND_MW)
        self.request.set_bind_wr(self._window, self._info)
        self.key: int = self.request.rkey

    def close(self) -> None:
        """Close the window, which makes its key void."""
        with suppress(PyverbsError):  # a removed device refuses to free its objects, which no longer matter
            self._window.close()


class Lane:
    """One end of a reliable connection. One thread calls ``send`` and ``write``, another ``completed``, under one lock."""

    def __init__(self, device: Device, *, receives: int, spare: int, sends: int, depth: int) -> None:
        self.receives = Receives(receives)
        self._device, self._depth = device, depth
        self._channel, self.fd = _open_channel(device)
        self._cq = CQ(device.context, receives + spare + sends + 1, None, self._channel, 0)
        self._cq.req_notify(False)
        cap = QPCap(max_send_wr=sends, max_recv_wr=receives + spare, max_send_sge=1, max_recv_sge=1)
        initial = QPInitAttr(qp_type=enums.IBV_QPT_RC, scq=self._cq, rcq=self._cq, cap=cap, sq_sig_all=0)
        self.qp = QP(device.domain, initial)
        self.qp.to_init(self._attributes())
        self._psn = secrets.randbits(_PSN_BITS)
        self._place = SGE(0, 0, 0)
        self._request = SendWR(num_sge=1, sg=[self._place])
        self._request.sg_list = self._place
        self._waiting: dict[int, RecvWR] = {}
        self._posted: deque[_Posted] = deque()
        self._number = 0
        self._chunks = 0
        self._unsignalled = 0

    def card(self, key: int) -> RailCard:
        """Description of this queue pair for the other end."""
        choice = self._device.choice
        return RailCard(
            self.qp.qp_num, self._psn, choice.port.lid, choice.gid.address.packed, choice.mtu, choice.port.infiniband, key
        )

    def connect(self, theirs: RailCard) -> None:
        """Connect the queue pair to ``theirs`` and make it ready to send."""
        choice, attributes = self._device.choice, self._attributes()
        attributes.path_mtu = mtu_code(min(choice.mtu, theirs.mtu))
        attributes.dest_qp_num = theirs.qp
        attributes.rq_psn, attributes.sq_psn = theirs.psn, self._psn
        attributes.min_rnr_timer = _RNR_TIMER
        attributes.timeout, attributes.retry_cnt, attributes.rnr_retry = _ACK_TIMEOUT, _RETRIES, _RNR_RETRIES
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 1
        attributes.ah_attr = self._route(theirs)
        self.qp.to_rts(attributes)

    def _attributes(self) -> QPAttr:
        attributes = QPAttr(port_num=self._device.choice.port.number)
        attributes.qp_access_flags = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
        return attributes

    def _route(self, theirs: RailCard) -> AHAttr:
        """Route to the peer: by LID within an InfiniBand subnet, otherwise by GID."""
        choice = self._device.choice
        port, mine = choice.port, choice.gid.address.packed
        if port.infiniband and theirs.infiniband and mine[:8] == theirs.gid[:8]:
            return AHAttr(dlid=theirs.lid, is_global=0, port_num=port.number)
        gid = ":".join(theirs.gid[at : at + 2].hex() for at in range(0, 16, 2))
        route = GlobalRoute(dgid=GID(gid), sgid_index=choice.gid.index, hop_limit=_HOPS)
        return AHAttr(dlid=theirs.lid, is_global=1, port_num=port.number, gr=route)

    # -- sending -----------------------------------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """True if another chunk may be posted."""
        return self._chunks < self._depth

    @property
    def idle(self) -> bool:
        """True if nothing is in flight."""
        return not self._posted

    def stuck_s(self) -> float:
        """Seconds for which the oldest work request has waited for its completion; 0 without one."""
        posted = self._posted
        return time.monotonic() - posted[0].at if posted else 0.0

    def send(self, address: int, size: int, key: int, done: Callable[[], None] | None) -> None:
        """Send from registered memory; ``completed`` returns ``done`` once it has arrived. LaneError if refused."""
        self._request.opcode = enums.IBV_WR_SEND
        self._post(address, size, key, done, chunk=False, signalled=True)

    def write(
        self,
        address: int,
        size: int,
        key: int,
        *,
        to: int,
        remote_key: int,
        immediate: int | None,
        done: Callable[[], None] | None,
    ) -> None:
        """Write a chunk; the last of a write has an immediate. Only some chunks request a completion. LaneError if refused."""
        request = self._request
        request.opcode = enums.IBV_WR_RDMA_WRITE if immediate is None else enums.IBV_WR_RDMA_WRITE_WITH_IMM
        request.imm_data = immediate or 0
        request.set_wr_rdma(remote_key, to)
        signalled = immediate is not None or self._unsignalled + 1 >= max(1, self._depth // 4)
        self._post(address, size, key, done, chunk=True, signalled=signalled)

    def window(self, region: Region, rail: int) -> Window:
        """Make a window for this lane's peer, still to be bound; LaneError if the device has no more."""
        try:
            return Window(self._device, region, rail)
        except PyverbsError as error:
            raise LaneError(f"the device has no memory window left: {error}") from error

    def bind(self, window: Window, done: Callable[[], None]) -> None:
        """Bind a window; it is open for everything sent later on this lane. LaneError if refused."""
        self._submit(window.request, done, chunk=False, signalled=True)

    def _post(self, address: int, size: int, key: int, done: Callable[[], None] | None, *, chunk: bool, signalled: bool) -> None:
        place = self._place
        place.addr, place.length, place.lkey = address, size, key
        self._submit(self._request, done, chunk=chunk, signalled=signalled)

    def _submit(self, request: SendWR, done: Callable[[], None] | None, *, chunk: bool, signalled: bool) -> None:
        self._number += 1
        request.wr_id = self._number << 1 | 1
        request.send_flags = enums.IBV_SEND_SIGNALED if signalled else 0
        self._unsignalled = 0 if signalled else self._unsignalled + 1
        self._posted.append(_Posted(self._number, time.monotonic(), chunk, done))
        self._chunks += chunk
        try:
            self.qp.post_send(request)
        except PyverbsError as error:
            raise LaneError(f"a work request is refused: {error}") from error

    # -- receiving ---------------------------------------------------------------------------------------------------

    def receive(self, slot: int, address: int, size: int, key: int) -> None:
        """Post a receive into a slot of registered memory (``size`` 0: for immediates only)."""
        self._waiting[slot] = RecvWR(wr_id=slot << 1, num_sge=1, sg=[SGE(address, size, key)])
        self.qp.post_recv(self._waiting[slot])

    def receive_again(self, slot: int) -> None:
        """Post a slot's receive again; LaneError if refused."""
        try:
            self.qp.post_recv(self._waiting[slot])
        except PyverbsError as error:
            raise LaneError(f"a receive is refused: {error}") from error

    def acknowledge(self) -> None:
        """Take the event of a readable channel and request the next one; poll completions after this. LaneError on failure."""
        try:
            self._channel.get_cq_event(self._cq)
            self._cq.ack_events(1)
            self._cq.req_notify(False)
        except PyverbsError as error:
            raise LaneError(f"its completions cannot be waited for: {error}") from error

    def completed(self, into: list[Arrival | Callable[[], None]]) -> None:
        """Append arrivals and the ``done`` of completed work requests to ``into``; LaneError at the first failure."""
        while True:
            count, completions = self._poll()
            for completion in completions:
                if completion.status != enums.IBV_WC_SUCCESS:
                    raise LaneError(_reason(completion.status))
                if completion.wr_id & 1:
                    into.extend(self._retire(completion.wr_id >> 1))
                else:
                    into.append(self._arrival(completion))
            if count < _BATCH:
                return

    def _poll(self) -> tuple[int, Any]:
        try:
            count, completions = self._cq.poll(_BATCH)
        except PyverbsError as error:
            raise LaneError(f"its completions cannot be read: {error}") from error
        return count, completions

    def _retire(self, number: int) -> Iterator[Callable[[], None]]:
        """Remove the work requests up to ``number``, all completed by its completion; yield their ``done``."""
        while self._posted and self._posted[0].number <= number:
            posted = self._posted.popleft()
            self._chunks -= posted.chunk
            if posted.done is not None:
                yield posted.done

    @staticmethod
    def _arrival(completion: Any) -> Arrival:
        written = completion.opcode == enums.IBV_WC_RECV_RDMA_WITH_IMM
        return Arrival(completion.wr_id >> 1, completion.byte_len, completion.imm_data if written else None)

    def fail(self) -> None:
        """Put the queue pair into its error state, as a device fault would, flushing what is in flight. For tests."""
        attributes = QPAttr(qp_state=enums.IBV_QPS_ERR)
        self.qp.modify(attributes, enums.IBV_QP_STATE)

    def close(self) -> None:
        """Close the queue pair, dropping what is in flight."""
        # A removed device refuses to free its objects, which no longer matter.
        for each in (self.qp, self._cq, self._channel):
            with suppress(PyverbsError):
                each.close()


def _reason(status: int) -> str:
    for name, text in _REASONS.items():
        if status == getattr(enums, name):
            return text
    return f"a work request has failed (status {status} of ibv_wc_status)"


def _open_channel(device: Device) -> tuple[CompChannel, int]:
    """Open a completion channel; return it and its file descriptor, the new one of this process, since pyverbs hides it.

    Waiting in pyverbs itself would stop all threads, since it holds the interpreter lock.
    """
    with _opening:
        before = _event_descriptors()
        channel = CompChannel(device.context)
        (new,) = _event_descriptors() - before
    return channel, new


def _event_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile, like the listing's own descriptor
            if os.readlink(f"/proc/self/fd/{name}").endswith("[infinibandevent]"):
                found.add(int(name))
    return found
