"""Warm-up of a device: contexts, libraries and kernels load at their first use, which takes seconds on a GPU."""

from __future__ import annotations

import torch

from lambdascale.checkpoints import PackedModel
from lambdascale.checkpoints.convert import TORCH_TYPES
from lambdascale.inference.batch import Segment, StageBatch
from lambdascale.inference.choosing import choose
from lambdascale.inference.compiling import COMPILER
from lambdascale.inference.fused import has_triton
from lambdascale.inference.sampling import GREEDY
from lambdascale.inference.stage import TransformerStage
from lambdascale.inference.weights import BlockWeights

_PROMPT = 4


def warm_up(model: PackedModel, device: str, *, kernels: bool = False) -> None:
    """Run a prefill, a part of one and a decode over zero weights shaped as the model's first and last block; free the memory.

    A part that does not begin at the first token is attended to under a mask, by other kernels. ``kernels``: on a GPU, also wait
    for the kernels that replace torch's operators there: a second if they were compiled before, else several.
    """
    for layout in {layout.index: layout for layout in (model.layouts[0], model.layouts[-1])}.values():
        buffer = torch.zeros(layout.size_bytes, dtype=torch.uint8, device=device)
        stage = TransformerStage(model.architecture, [BlockWeights(layout, buffer)], 3, 2 * _PROMPT)
        segments = Segment(0, 0, _PROMPT), Segment(1, 1, _PROMPT), Segment(2, 0, 1)
        mixed = StageBatch(segments, 1, (_PROMPT - 1, 2 * _PROMPT - 1, 2 * _PROMPT))
        rows = mixed.rows
        inputs = torch.zeros(rows, dtype=torch.long)
        hidden = torch.zeros(rows, model.architecture.hidden, dtype=stage.dtype, device=device)
        state = stage.rehearse(mixed, inputs if stage.is_first else hidden)
        if stage.is_last:
            choose(state, [GREEDY] * 3, [0] * 3)
    if torch.device(device).type == "cuda":
        # Not the whole device: while another thread records a graph, that is an error, and breaks the recording.
        torch.cuda.current_stream(device).synchronize()
        if kernels:
            compile_kernels(model, torch.device(device))


def compile_kernels(model: PackedModel, device: torch.device) -> None:
    """Wait for the kernels that replace torch's operators on a GPU, where Triton is installed."""
    if has_triton():
        COMPILER.wait(model.architecture, TORCH_TYPES[model.dtype], device)
