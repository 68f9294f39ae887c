"""Communicators of broadcasts: NCCL from GPU to GPU, or gloo through the memory of hosts. A communicator serves one broadcast.

Which of them is decided once for a cluster (lambdascale.live.communicator_choice).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import distributed

from lambdascale.inference import devices

TIMEOUT_S = 20.0
_POLL_S = 0.0002
# A broken broadcast is this module's business. torch's own watchdog would end the process, with all that it serves.
_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


def has_nccl() -> bool:
    """True if this build of PyTorch has NCCL; those for CPUs do not."""
    return bool(distributed.is_available() and distributed.is_nccl_available())


class Communicator(Protocol):
    """A context: left with an exception, it is torn down without waiting for other members."""

    def broadcast(self, data: torch.Tensor, root: int) -> None:
        """Bring the root's bytes to all members; complete when it returns. RuntimeError if it breaks."""
        ...

    def __enter__(self) -> Communicator: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Gloo:
    """Gloo, over TCP and through host memory. A GPU's tensors are staged there by gloo. ``host``: this node's address.

    By itself, it would listen at whatever address the machine's name has.
    """

    def __init__(self, store: Any, rank: int, size: int, host: str) -> None:
        gloo: Any = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=TIMEOUT_S)
        self._group = gloo(store, rank, size, options)

    def broadcast(self, data: torch.Tensor, root: int) -> None:
        """See Communicator."""
        devices.use(data.device)
        self._group.broadcast([data], _from(root)).wait()
        if data.is_cuda:  # until now, only this thread's stream waits for the last copy
            torch.cuda.current_stream(data.device).synchronize()

    def __enter__(self) -> Gloo:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Do nothing: sockets close with the last reference."""


class Nccl:
    """NCCL, from GPU to GPU. The constructor builds the communicator, whose connections NCCL makes with the first broadcast.

    On four H200 that broadcast takes 0.30 s more than the bytes, the constructor 0.08 s. With NCCL_RUNTIME_CONNECT=0 in the
    environment all of them are made here, also those that no broadcast uses, which takes 0.60 s: the baseline has the faster way
    (scripts/gpu_host.py, results/tables/gpu_host.csv).

    ``lost``: names the members that are lost, "" for none: between GPUs of a host, NCCL itself would wait for them. The set-up
    cannot be broken off: a member that dies within it may leave this thread waiting.
    """

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, lost: Callable[[], str]) -> None:
        os.environ.update(_WATCHDOG)
        nccl: Any = distributed.ProcessGroupNCCL  # type: ignore[attr-defined,unused-ignore]  # builds with NCCL have it
        devices.use(device)
        self._device = device
        self._lost = lost
        # Its own: what the node computes meanwhile, in the default stream, does not wait for a broadcast.
        self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            self._group = nccl(store, rank, size, nccl.Options())
            self._group.eager_connect_single_device(device)

    def broadcast(self, data: torch.Tensor, root: int) -> None:
        """See Communicator. A source may have its data in host memory; nothing may be pending on them."""
        devices.use(self._device)
        with torch.cuda.stream(self._stream):
            work = self._group.broadcast([data.to(self._device)], _from(root))
            work.wait()  # lets the stream wait, not the thread
            done = torch.cuda.Event()
            done.record()
            self._until(done)

    def _until(self, done: torch.cuda.Event) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not done.query():
            if lost := self._lost():
                raise RuntimeError(lost)
            if time.monotonic() > deadline:
                raise RuntimeError(f"NCCL has not moved a piece of a block within {TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)

    def __enter__(self) -> Nccl:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Broken, its kernels are stopped: they would occupy the GPU for ever."""
        self._group.shutdown() if kind is None else self._group.abort()


def _from(root: int) -> distributed.BroadcastOptions:
    options = distributed.BroadcastOptions()
    options.rootRank = root
    return options
