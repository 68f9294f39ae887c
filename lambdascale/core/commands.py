"""Commands of a control plane to a backend. Coarse on purpose: a backend carries a whole plan out without asking back.

An *instance* takes requests: a list of stages that cover a model. A replica has one stage (local mode), a pipeline several.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from lambdascale.core.failures import Failure
from lambdascale.core.plan import MulticastPlan, NodeId, Stage
from lambdascale.core.request import Request

Tier = Literal["gpu", "host", "ssd", "remote", "instant"]
Storage = Literal["ssd", "remote"]
KvPolicy = Literal["recompute", "copy"]
Loader = Literal["pipelined", "sequential"]
MulticastKind = Literal["one_sided", "collective"]


class Command(Struct, frozen=True, gc=False, tag=True):
    """Base of all commands."""


class AllocateNode(Command, frozen=True, gc=False, tag=True):
    """Give ``gpus`` GPUs of ``node`` to ``model``: the GPU-seconds of the model start to count here."""

    node: NodeId
    model: str
    gpus: int


class ReleaseNode(Command, frozen=True, gc=False, tag=True):
    """Free the model's GPUs on ``node``; its weights and KV leave GPU memory.

    ``keep_host``: the weights stay behind as a copy in host memory.
    """

    node: NodeId
    model: str
    gpus: int
    keep_host: bool = False


class PlaceCopy(Command, frozen=True, gc=False, tag=True):
    """Have a copy of ``model`` in ``node``'s host memory when the run starts."""

    node: NodeId
    model: str


class StartMulticast(Command, frozen=True, gc=False, tag=True):
    """Carry ``plan`` out for ``model``, whose block i has ``block_bytes[i]`` bytes.

    ``source_tiers[i]`` is the tier source i sends from (gpu or host). ``multicast`` "collective" needs a communicator
    over all members first and occupies the sources' GPUs; "one_sided" writes do neither. ``barrier_s``: the sends of a round
    start together, so many seconds after the last of the round before; None: nodes send as soon as they hold a block.
    """

    transfer_id: int
    model: str
    plan: MulticastPlan
    block_bytes: tuple[int, ...]
    source_tiers: tuple[Tier, ...]
    multicast: MulticastKind
    barrier_s: float | None = None


class LoadBlocks(Command, frozen=True, gc=False, tag=True):
    """Load ``blocks`` of ``model`` into ``node``'s GPU memory from its ``tier``, in the order given.

    ``loader`` "sequential" reads everything into host memory before it copies to the GPU; "pipelined" overlaps both.
    The tier "instant" takes no time: the ideal baseline's.
    """

    transfer_id: int
    model: str
    node: NodeId
    blocks: tuple[int, ...]
    block_bytes: tuple[int, ...]
    tier: Tier
    loader: Loader


class CancelTransfer(Command, frozen=True, gc=False, tag=True):
    """Stop a multicast or load; blocks that already arrived stay. Unknown or finished ids are ignored."""

    transfer_id: int


class Serve(Command, frozen=True, gc=False, tag=True):
    """Serve ``model`` as ``instance``: the nodes of ``stages`` hold their blocks. A replica is an instance of one stage.

    ``stages`` cover the model once, in order; a node may have several. ``block_bytes`` as in StartMulticast. ``kv_tokens``:
    tokens of KV memory of each of its batches, the least that its nodes have beside the model. Every batch has it: a node keeps
    the KV of its own layers only, and the instance has one batch in flight per node.
    """

    instance: int
    model: str
    stages: tuple[Stage, ...]
    block_bytes: tuple[int, ...]
    kv_tokens: int

    @property
    def is_pipeline(self) -> bool:
        """True with more than one stage."""
        return len(self.stages) > 1


class Repartition(Command, frozen=True, gc=False, tag=True):
    """Serve ``instance`` by ``stages`` from its next iterations on; iterations under way end on the stages they began with.

    The nodes of ``stages`` hold their blocks. ``kv``: the KV of running requests is copied to the nodes that take blocks over, or
    computed anew from their tokens. ``kv_tokens`` as in Serve, from now on.
    """

    instance: int
    stages: tuple[Stage, ...]
    kv: KvPolicy
    kv_tokens: int


class Dispatch(Command, frozen=True, gc=False, tag=True):
    """Hand requests to an instance, in order."""

    instance: int
    requests: tuple[Request, ...]


class SwitchMode(Command, frozen=True, gc=False, tag=True):
    """Dissolve ``pipeline`` and go on with its requests on replicas: ``moves`` is (request_id, instance) for each.

    The token in flight is redone. ``kv`` says whether a target recomputes the KV cache from the tokens so far or
    copies the layers it lacks from the other stages (paper, section 4.4). A target that is a pipeline recomputes.
    """

    pipeline: int
    moves: tuple[tuple[int, int], ...]
    kv: KvPolicy


class StopInstance(Command, frozen=True, gc=False, tag=True):
    """Take an instance out of service. Requests it still has are dropped there; the control plane re-dispatches them."""

    instance: int


class EvictBlocks(Command, frozen=True, gc=False, tag=True):
    """Drop ``model`` from ``node``'s memory tier ``tier``."""

    node: NodeId
    model: str
    tier: Tier


class SetTimer(Command, frozen=True, gc=False, tag=True):
    """Answer with TimerFired(timer_id) at time ``at``."""

    timer_id: int
    at: float


class FailRequest(Command, frozen=True, gc=False, tag=True):
    """Give a request up: its client gets ``failure`` as an error."""

    request_id: int
    failure: Failure


AnyCommand = (
    AllocateNode
    | ReleaseNode
    | PlaceCopy
    | StartMulticast
    | LoadBlocks
    | CancelTransfer
    | Serve
    | Repartition
    | Dispatch
    | SwitchMode
    | StopInstance
    | EvictBlocks
    | SetTimer
    | FailRequest
)
