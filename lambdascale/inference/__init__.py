"""The engine of one node (torch): blocks as packed weights, stages of a transformer, KV slots, batches and sampling.

It knows no transport and no cluster. The control plane's batch scheduler, the class that the simulator uses too, decides which
sequences form an iteration. Modules are imported when a name of theirs is first used: the controller needs those without torch,
which takes seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lambdascale.inference.batch import Batch, BatchPlan, Produced, Segment, StageBatch, Ticket
    from lambdascale.inference.engine import Engine
    from lambdascale.inference.kv_cache import KvCache
    from lambdascale.inference.loading import BlockError, Load
    from lambdascale.inference.sampling import Sampling
    from lambdascale.inference.stage import TransformerStage
    from lambdascale.inference.store import BlockInUseError, BlockStore, StoreConfig
    from lambdascale.inference.warmup import compile_kernels, reserve_kv, warm_up
    from lambdascale.inference.weights import BlockWeights, load_blocks

_MODULES = {
    "Batch": "batch",
    "BatchPlan": "batch",
    "BlockError": "loading",
    "BlockInUseError": "store",
    "BlockStore": "store",
    "BlockWeights": "weights",
    "Engine": "engine",
    "KvCache": "kv_cache",
    "Load": "loading",
    "Produced": "batch",
    "Sampling": "sampling",
    "Segment": "batch",
    "StageBatch": "batch",
    "StoreConfig": "store",
    "Ticket": "batch",
    "TransformerStage": "stage",
    "compile_kernels": "warmup",
    "load_blocks": "weights",
    "reserve_kv": "warmup",
    "warm_up": "warmup",
}

__all__ = [
    "Batch",
    "BatchPlan",
    "BlockError",
    "BlockInUseError",
    "BlockStore",
    "BlockWeights",
    "Engine",
    "KvCache",
    "Load",
    "Produced",
    "Sampling",
    "Segment",
    "StageBatch",
    "StoreConfig",
    "Ticket",
    "TransformerStage",
    "compile_kernels",
    "load_blocks",
    "reserve_kv",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    """Import the module of a public name, and keep the name here."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
