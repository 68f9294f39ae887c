"""Greedy answers of the engine's kernels and replays beside those of torch's operators: rounding makes them part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch

from lambdascale.checkpoints import Architecture, block_layouts
from lambdascale.checkpoints.convert import TORCH_TYPES
from lambdascale.control.batching import BatchLimits
from lambdascale.inference import BlockWeights, Engine, Ticket, TransformerStage
from lambdascale.inference.forms import Form

Row = dict[str, Any]
_BATCH = 8


class _TorchStage(TransformerStage):
    """A stage that keeps torch's operators and replays nothing."""

    def _use_kernels(self) -> None:
        """Keep torch's operators."""


def widened(architecture: Architecture, blocks: Sequence[BlockWeights]) -> list[BlockWeights]:
    """Return the same weights in float32."""
    layouts = block_layouts(architecture, "F32", len(blocks))
    found = []
    for layout, block in zip(layouts, blocks, strict=True):
        buffer = block.buffer.view(TORCH_TYPES[block.layout.dtype]).float().view(torch.uint8)
        assert buffer.numel() == layout.size_bytes, "a block has no padding between its tensors"
        found.append(BlockWeights(layout, buffer))
    return found


def divergence_rows(
    model: str, architecture: Architecture, blocks: Sequence[BlockWeights], prompts: int = 32, length: int = 64, tokens: int = 64
) -> Iterator[Row]:
    """Compare answers to random prompts: the engine as it serves, with torch's operators, in the blocks' type and in float32."""
    generator = torch.Generator().manual_seed(0)
    asked = torch.randint(0, architecture.vocab, (prompts, length), generator=generator).tolist()
    dtype = blocks[0].layout.dtype
    served = answers(TransformerStage, architecture, blocks, asked, tokens)
    plain = answers(_TorchStage, architecture, blocks, asked, tokens)
    yield compared(model, f"{dtype} beside torch in {dtype}", served, plain)
    wide = widened(architecture, blocks)
    exact = answers(_TorchStage, architecture, wide, asked, tokens)
    yield compared(model, f"{dtype} beside torch in F32", served, exact)
    yield compared(model, f"torch in {dtype} beside torch in F32", plain, exact)
    yield compared(model, "F32 beside torch in F32", answers(TransformerStage, architecture, wide, asked, tokens), exact)


def answers(
    kind: type[TransformerStage],
    architecture: Architecture,
    blocks: Sequence[BlockWeights],
    prompts: Sequence[Sequence[int]],
    tokens: int,
) -> list[list[int]]:
    """Return the greedy answers of ``tokens`` tokens."""
    stage = kind(architecture, blocks, _BATCH, len(prompts[0]) + tokens)
    if kind is TransformerStage:
        stage.prepare([Form(_BATCH)])
    engine = Engine([stage], BatchLimits(max_batch=_BATCH))
    tickets = [Ticket(index, list(prompt), len(prompt), tokens) for index, prompt in enumerate(prompts)]
    for ticket in tickets:
        engine.add(ticket)
    while len(engine):
        engine.step()
    return [ticket.output for ticket in tickets]


def compared(model: str, what: str, found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> Row:
    """Return a row: shares of equal tokens (position by position) and of diverging answers, and the positions of divergence.

    The positions are the median and the earliest, counted from 0; None if no answer diverges.
    """
    pairs = [[a == b for a, b in zip(one, two, strict=True)] for one, two in zip(found, wanted, strict=True)]
    parted = [equal.index(False) for equal in pairs if False in equal]
    tokens = sum(len(equal) for equal in pairs)
    return {
        "model": model,
        "compared": what,
        "prompts": len(pairs),
        "tokens": tokens // len(pairs),
        "equal_tokens": sum(sum(equal) for equal in pairs) / tokens,
        "answers_that_part": len(parted) / len(pairs),
        "median_first": median(parted) if parted else None,
        "earliest": min(parted, default=None),
    }
