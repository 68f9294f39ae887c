"""The engine of one node (torch): blocks as packed weights, stages of a transformer, KV slots, batches and sampling.

It knows no transport and no cluster. The control plane's batch scheduler, the class that the simulator uses too, decides which
sequences form an iteration.
"""

from lambdascale.inference.batch import Batch, BatchPlan, Produced, Segment, StageBatch, Ticket
from lambdascale.inference.engine import Engine
from lambdascale.inference.kv_cache import KvCache
from lambdascale.inference.loading import BlockError, Load
from lambdascale.inference.sampling import Sampling
from lambdascale.inference.stage import TransformerStage
from lambdascale.inference.store import BlockInUseError, BlockStore, StoreConfig
from lambdascale.inference.warmup import warm_up
from lambdascale.inference.weights import BlockWeights, load_blocks

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
    "load_blocks",
    "warm_up",
]
