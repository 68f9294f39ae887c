"""Warm-up of a device: contexts, libraries and kernels load at their first use, which takes seconds on a GPU."""

from __future__ import annotations

import torch

from lambdascale.checkpoints import PackedModel
from lambdascale.checkpoints.convert import TORCH_TYPES
from lambdascale.inference.batch import Segment, StageBatch
from lambdascale.inference.choosing import choose
from lambdascale.inference.fused import COMPILER, has_triton
from lambdascale.inference.sampling import GREEDY
from lambdascale.inference.stage import TransformerStage
from lambdascale.inference.weights import BlockWeights

_PROMPT = 4


def warm_up(model: PackedModel, device: str, patience_s: float | None = 0.0) -> None:
    """Run a prefill, a part of one and a decode over zero weights shaped as the model's first and last block; free the memory.

    A part that does not begin at the first token is attended to under a mask, by other kernels. On a GPU, then wait up to
    ``patience_s`` (None: as long as it takes) for the kernels that replace torch's operators: long enough if they only have to
    be read from the disk, where they were compiled before.
    """
    for layout in {layout.index: layout for layout in (model.layouts[0], model.layouts[-1])}.values():
        buffer = torch.zeros(layout.size_bytes, dtype=torch.uint8, device=device)
        stage = TransformerStage(model.architecture, [BlockWeights(layout, buffer)], 3, 2 * _PROMPT)
        segments = Segment(0, 0, _PROMPT), Segment(1, 1, _PROMPT), Segment(2, 0, 1)
        mixed = StageBatch(segments, 1, (_PROMPT - 1, 2 * _PROMPT - 1, 2 * _PROMPT))
        rows = mixed.rows
        inputs = torch.zeros(rows, dtype=torch.long)
        hidden = torch.zeros(rows, model.architecture.hidden, dtype=stage.dtype, device=device)
        state = stage.run(mixed, inputs if stage.is_first else hidden)
        if stage.is_last:
            choose(state, [GREEDY] * 3, [0] * 3)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        if has_triton():
            COMPILER.wait(model.architecture, TORCH_TYPES[model.dtype], torch.device(device), patience_s)
