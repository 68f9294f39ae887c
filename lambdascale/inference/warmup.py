"""Warm-up of a device: contexts, libraries and kernels load at their first use, which takes seconds on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch

from lambdascale.checkpoints import PackedModel
from lambdascale.checkpoints.convert import TORCH_TYPES
from lambdascale.inference import devices
from lambdascale.inference.batch import Segment, StageBatch
from lambdascale.inference.choosing import choose
from lambdascale.inference.compiling import COMPILER
from lambdascale.inference.fused import has_triton
from lambdascale.inference.kv_cache import KvCache
from lambdascale.inference.sampling import GREEDY
from lambdascale.inference.stage import TransformerStage
from lambdascale.inference.weights import BlockWeights

_PROMPT = 4
# Rows of the iterations that are rehearsed, and of each prompt in them.
_SIZES, _LONGER = (64, 128, 256, 512, 1024, 2048), 64


def warm_up(model: PackedModel, device: str, *, kernels: bool = False) -> None:
    """Run a prefill, a part of one and a decode over zero weights shaped as the model's first and last block; free the memory.

    A part that does not begin at the first token is attended to under a mask, by other kernels. ``kernels``: on a GPU, also wait
    for the kernels that replace torch's operators there: a second if they were compiled before, else several.
    """
    for stage in _ends(model, device, 3, 2 * _PROMPT):
        segments = Segment(0, 0, _PROMPT), Segment(1, 1, _PROMPT), Segment(2, 0, 1)
        mixed = StageBatch(segments, 1, (_PROMPT - 1, 2 * _PROMPT - 1, 2 * _PROMPT))
        state = stage.rehearse(mixed, _inputs(stage, mixed.rows))
        if stage.is_last:
            choose(state, [GREEDY] * 3, [0] * 3)
    if torch.device(device).type == "cuda":
        # Not the whole device: while another thread records a graph, that is an error, and breaks the recording.
        torch.cuda.current_stream(device).synchronize()
        if kernels:
            compile_kernels(model, torch.device(device))


def compile_kernels(model: PackedModel, device: torch.device) -> None:
    """Wait for the kernels that replace torch's operators on a GPU, where Triton is installed, and rehearse prompts by them.

    Libraries load the code for products of a size when it is first needed: 30 ms of a new node's first iteration of 1,024 rows.
    """
    devices.use(device)
    if has_triton():
        COMPILER.wait(model.architecture, TORCH_TYPES[model.dtype], device)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            rehearse_prompts(model, str(device), kernels=True)
            torch.cuda.current_stream(device).synchronize()


def rehearse_prompts(model: PackedModel, device: str, *, kernels: bool) -> None:
    """Run prompts over zero weights shaped as the model's first and last block, of usual numbers of rows; free the memory.

    ``kernels``: by the kernels, which must be compiled, instead of torch's operators.
    """
    length = min(_LONGER, model.architecture.max_position)
    for stage in _ends(model, device, _SIZES[-1] // _LONGER, length):
        for rows in _SIZES:
            count = rows // _LONGER
            segments = tuple(Segment(slot, 0, length) for slot in range(count))
            batch = StageBatch(segments, 0, tuple(length * (slot + 1) - 1 for slot in range(count)))
            stage.rehearse(batch, _inputs(stage, batch.rows), kernels=kernels)


def reserve_kv(model: PackedModel, device: torch.device, slots: int, slot_tokens: int) -> None:
    """Have torch keep as much free memory as the KV of a replica takes, unless the GPU has less: to get it takes 12 ms a GiB."""
    devices.use(device)
    with suppress(torch.OutOfMemoryError):
        KvCache(model.architecture, model.architecture.layers, slots, slot_tokens, TORCH_TYPES[model.dtype], device)


def _ends(model: PackedModel, device: str, slots: int, slot_tokens: int) -> Iterator[TransformerStage]:
    """Yield stages of the first and of the last block, of zero weights."""
    for layout in {layout.index: layout for layout in (model.layouts[0], model.layouts[-1])}.values():
        buffer = torch.zeros(layout.size_bytes, dtype=torch.uint8, device=device)
        yield TransformerStage(model.architecture, [BlockWeights(layout, buffer)], slots, slot_tokens)


def _inputs(stage: TransformerStage, rows: int) -> torch.Tensor:
    """Return token ids or hidden states, as the stage takes them."""
    if stage.is_first:
        return torch.zeros(rows, dtype=torch.long)
    return torch.zeros(rows, stage.architecture.hidden, dtype=stage.dtype, device=stage.device)
