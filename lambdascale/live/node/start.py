"""Timed parts of a node's start, and spare processes, which have completed the first of these parts."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lambdascale.checkpoints import PackedModel
from lambdascale.core.checks import require
from lambdascale.live.node_config import NodeConfig

if TYPE_CHECKING:
    from lambdascale.inference import BlockStore

_PDEATHSIG = 1
# A node that has just joined may have to load at once, and the first token waits for nothing: kernels are compiled later.
_QUIET_S = 0.5


class StartParts:
    """Seconds of each part of a start, in full where they overlap.

    The first is ``process``, from ``launched`` (by the monotonic clock; None: not known) to now.
    """

    def __init__(self, launched: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = {} if launched is None else {"process": max(0.0, clock() - launched)}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part."""
        begin = self._clock()
        yield
        self.seconds[name] = self._clock() - begin


def bind() -> None:
    """Bind this process to its parent: it ignores interrupts, and dies when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)


def pick_gpu(config: NodeConfig) -> int | None:
    """Return a node's GPU, None on ``device: cpu``: nodes take turns at those they see. UserError if they see none."""
    if config.device == "cpu":
        return None
    import torch

    count = torch.cuda.device_count()
    require(count > 0, "device cuda is asked for, but torch finds no GPU")
    return config.node % count


def warm(models: Iterable[PackedModel], gpu: int, *, kernels: bool) -> None:
    """Load libraries, and ``kernels`` if asked, for models on a GPU; see warm_up.

    The GPU is that of the calling thread from then on.
    """
    import torch

    from lambdascale.inference import warm_up

    torch.cuda.set_device(gpu)
    for model in models:
        warm_up(model, f"cuda:{gpu}", kernels=kernels)


def compile_when_quiet(store: BlockStore, gpu: int, leaving: threading.Event, slots: int, slot_tokens: int) -> None:
    """Compile the kernels of a store's models once nothing has to be loaded, unless the node is ``leaving`` before.

    Also reserve memory for the KV of a replica: ``slots`` of ``slot_tokens`` tokens.
    """
    import torch

    from lambdascale.inference import compile_kernels, reserve_kv

    device = torch.device("cuda", gpu)
    while not leaving.wait(_QUIET_S):
        if not store.loading:
            for model in store.models:
                compile_kernels(model, device)
                reserve_kv(model, device, slots, slot_tokens)
            break


def make_context(gpu: int | None) -> None:
    """Import what a node needs and make the context of its GPU, None: it has none."""
    import torch

    import lambdascale.live.node.preload  # noqa: F401  imported for its effect

    if gpu is not None:
        torch.cuda.set_device(gpu)
        torch.zeros(1, device=f"cuda:{gpu}")
        torch.cuda.current_stream(gpu).synchronize()
