"""Times of a model's iterations on this machine: prefill by tokens, decode by batch and context.

On a CPU block by block. On a GPU as they are served, by the whole model: launches of a block cost more than its arithmetic, and
decode steps are replayed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from statistics import median

import torch

from lambdascale.calibration.probes import once
from lambdascale.checkpoints import Architecture, PackedModel
from lambdascale.core import ComputeTable
from lambdascale.inference import BlockStore, BlockWeights, Segment, StageBatch, StoreConfig, TransformerStage
from lambdascale.inference.forms import Form
from lambdascale.inference.sampling import GREEDY

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Points at which iterations are timed: prompt lengths, batch sizes, and contexts of decode steps."""

    prefill_tokens: tuple[int, ...] = (16, 64, 128, 256, 512, 1024)
    decode_batch: tuple[int, ...] = (1, 2, 4, 8)
    contexts: tuple[int, ...] = (32, 512)
    rounds: int = 5


GPU_GRID = Grid(
    prefill_tokens=(16, 64, 128, 256, 512, 1024, 2048, 4096), decode_batch=(1, 2, 4, 8, 16, 32), contexts=(64, 1024), rounds=9
)
# More tokens are prefilled as several prompts of at most this length.
_PROMPT = 2048
# Iterations before the first that counts: of a new shape they prepare kernels and memory, and a host that was idle is slow.
_WARM_UP, _WARM_UP_S = 3, 0.5


@dataclass(frozen=True)
class BlockTimes:
    """Seconds of one block: ``prefill_s[i]`` for the grid's i-th prompt length, ``decode_s[i][j]`` for batch i at context j.

    ``block`` None: of the whole model.
    """

    block: int | None
    prefill_s: tuple[float, ...]
    decode_s: tuple[tuple[float, ...], ...]


@contextmanager
def loaded(model: PackedModel, device: str) -> Iterator[list[BlockWeights]]:
    """Yield all blocks of a model, loaded by the block store."""
    arena = sum(-(-size // 4096) * 4096 for size in model.block_bytes)
    # On the way to a GPU every block passes through host memory.
    config = StoreConfig(host_bytes=0 if device == "cpu" else arena, device_bytes=arena, device=device)
    with BlockStore(config) as store:
        store.add(model)
        store.load(model.name, range(len(model.blocks)), keep_host=False).wait()
        with store.weights(model.name, range(len(model.blocks))) as weights:
            yield weights


def measure_blocks(architecture: Architecture, blocks: Sequence[BlockWeights], grid: Grid) -> list[BlockTimes]:
    """Time every block as a stage of its own, one after the other, in the order in which a model runs them.

    A block that is repeated alone has its weights in a cache and appears a quarter faster than it is.
    """
    longest = min(architecture.max_position, max(*grid.prefill_tokens, *(context + 1 for context in grid.contexts)))
    stages = [TransformerStage(architecture, [block], max(grid.decode_batch), longest) for block in blocks]
    prefills = [_in_turn(stages, prefill(min(tokens, longest)), grid.rounds) for tokens in grid.prefill_tokens]
    decodes = [
        [_in_turn(stages, decode(batch, min(context, longest - 1)), grid.rounds) for context in grid.contexts]
        for batch in grid.decode_batch
    ]
    return [
        BlockTimes(
            block.layout.index,
            tuple(times[index] for times in prefills),
            tuple(tuple(times[index] for times in row) for row in decodes),
        )
        for index, block in enumerate(blocks)
    ]


def measure_whole(architecture: Architecture, blocks: Sequence[BlockWeights], grid: Grid) -> BlockTimes:
    """Time iterations of the whole model as they are served, from token to token on the host.

    Decode steps and prompts that replicas record in spare time are replays, prepared beforehand.
    """
    longest = min(architecture.max_position, _PROMPT, max(grid.prefill_tokens))
    stage = TransformerStage(architecture, blocks, -(-max(grid.prefill_tokens) // longest), longest)
    prefills = []
    for batch in (prompts(tokens, longest) for tokens in grid.prefill_tokens):
        stage.prepare_for(batch)
        prefills.append(median(_answered(stage, batch, grid.rounds)))
    del stage
    slot = min(architecture.max_position, max(grid.contexts) + 1)
    stage = TransformerStage(architecture, blocks, max(grid.decode_batch), slot)
    decodes = []
    for size in grid.decode_batch:
        stage.prepare([Form(size)])
        decodes.append(tuple(median(_answered(stage, decode(size, context), grid.rounds)) for context in grid.contexts))
    return BlockTimes(None, tuple(prefills), tuple(decodes))


def _answered(stage: TransformerStage, batch: StageBatch, rounds: int) -> list[float]:
    """Return the seconds of each iteration up to its tokens on the host, after some that do not count.

    Tokens differ: a GPU multiplies equal rows up to an eighth faster, since that takes less power.
    """
    inputs, rules = torch.arange(batch.rows) % stage.architecture.vocab, [GREEDY] * len(batch.wanted)

    def once_s() -> float:
        begin = time.perf_counter()
        stage.answer(batch, inputs, rules, [0] * len(rules))
        return time.perf_counter() - begin

    until, warm = time.perf_counter() + _WARM_UP_S, 0
    while warm < _WARM_UP or time.perf_counter() < until:
        once_s()
        warm += 1
    return [once_s() for _ in range(rounds)]


def prefill(tokens: int) -> StageBatch:
    """Return a batch of one prompt of ``tokens``."""
    return prompts(tokens, tokens)


def prompts(tokens: int, longest: int) -> StageBatch:
    """Return a batch of ``tokens`` in as few prompts of at most ``longest`` as possible."""
    lengths = [min(longest, tokens - begin) for begin in range(0, tokens, longest)]
    segments = tuple(Segment(slot, 0, length) for slot, length in enumerate(lengths))
    return StageBatch(segments, 0, tuple(accumulate(lengths, initial=-1))[1:])


def decode(batch: int, context: int) -> StageBatch:
    """Return a decode step of ``batch`` sequences with ``context`` tokens each."""
    return StageBatch(tuple(Segment(slot, context, 1) for slot in range(batch)), batch, tuple(range(batch)))


def _in_turn(stages: Sequence[TransformerStage], batch: StageBatch, rounds: int) -> list[float]:
    """Return the median seconds of each stage over ``rounds`` passes through all of them, after one that does not count."""
    times: list[list[float]] = [[] for _ in stages]
    inputs = [inputs_of(stage, batch) for stage in stages]
    for _ in range(rounds + 1):
        for stage, given, found in zip(stages, inputs, times, strict=True):
            found.append(once(partial(stage.run, batch, given), stage.device))
    return [median(found[1:]) for found in times]


def inputs_of(stage: TransformerStage, batch: StageBatch) -> Tensor:
    """Return an input of the right shape and type for a stage, token ids on the host."""
    if stage.is_first:
        return torch.zeros(batch.rows, dtype=torch.long)
    shape = (batch.rows, stage.architecture.hidden)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(stage.device, stage.dtype)


def table(model: str, times: Sequence[BlockTimes], grid: Grid) -> ComputeTable:
    """Return the whole model's times, sums over its blocks, as the simulator's compute model takes them."""
    prefills = [sum(column) for column in zip(*(t.prefill_s for t in times), strict=True)]
    decodes = [[sum(t.decode_s[i][j] for t in times) for j in range(len(grid.contexts))] for i in range(len(grid.decode_batch))]
    return ComputeTable(
        model=model,
        prefill_tokens=tuple(map(float, grid.prefill_tokens)),
        prefill_s=tuple(prefills),
        decode_batch=tuple(map(float, grid.decode_batch)),
        decode_s=tuple(row[0] for row in decodes),
        decode_s_per_context_token=_slope(decodes, grid),
    )


def _slope(decodes: Iterable[Sequence[float]], grid: Grid) -> float:
    """Return seconds per token of context: the median over batch sizes of the slope from first to last context, at least 0."""
    span = grid.contexts[-1] - grid.contexts[0]
    if span <= 0:
        return 0.0
    slopes = [(row[-1] - row[0]) / (span * batch) for row, batch in zip(decodes, grid.decode_batch, strict=True)]
    return max(0.0, median(slopes))
