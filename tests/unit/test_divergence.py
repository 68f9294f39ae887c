"""Divergence of answers, and iterations of whole models as profiles of GPUs time them; here on a CPU."""

from __future__ import annotations

import pytest
import torch

from lambdascale.calibration import iterations
from lambdascale.calibration.divergence import compared, divergence_rows, widened
from lambdascale.calibration.iterations import Grid, measure_whole, prompts
from lambdascale.checkpoints import block_layouts
from lambdascale.checkpoints.architecture import parse_architecture
from lambdascale.checkpoints.convert import TORCH_TYPES
from lambdascale.checkpoints.synthetic import PRESETS
from lambdascale.inference import BlockWeights

TINY = parse_architecture(dict(PRESETS["tiny"]))


def weights(dtype: str) -> list[BlockWeights]:
    generator, found = torch.Generator().manual_seed(0), []
    for layout in block_layouts(TINY, dtype, 2):
        buffer = torch.empty(layout.size_bytes, dtype=torch.uint8)
        buffer.view(TORCH_TYPES[dtype]).normal_(0, 0.05, generator=generator)
        found.append(BlockWeights(layout, buffer))
    return found


def test_answers_are_compared_place_by_place() -> None:
    row = compared("m", "this", [[1, 2, 3, 4], [1, 2, 3, 4], [9, 2, 3, 4]], [[1, 2, 3, 4], [1, 2, 7, 4], [1, 2, 3, 4]])
    assert row == {
        "model": "m",
        "compared": "this",
        "prompts": 3,
        "tokens": 4,
        "equal_tokens": 10 / 12,
        "answers_that_part": 2 / 3,
        "median_first": 1.0,
        "earliest": 0,
    }
    assert compared("m", "this", [[1]], [[1]])["earliest"] is None


def test_wider_weights_are_the_same_numbers() -> None:
    narrow = weights("BF16")
    for one, two in zip(narrow, widened(TINY, narrow), strict=True):
        assert torch.equal(one.buffer.view(torch.bfloat16).float(), two.buffer.view(torch.float32))
        assert torch.equal(one.layers[-1].down.float(), two.layers[-1].down)


def test_float32_answers_are_equal() -> None:
    rows = list(divergence_rows("tiny", TINY, weights("BF16"), prompts=3, length=8, tokens=4))
    assert rows[-1]["compared"] == "F32 beside torch in F32"
    assert rows[-1]["equal_tokens"] == 1.0
    assert len(rows) == 4


@pytest.mark.parametrize(("tokens", "longest", "lengths"), [(5, 2, [2, 2, 1]), (4, 4, [4]), (3, 8, [3])])
def test_prompts_of_at_most_a_length(tokens: int, longest: int, lengths: list[int]) -> None:
    batch = prompts(tokens, longest)
    assert [segment.tokens for segment in batch.segments] == lengths
    assert [segment.slot for segment in batch.segments] == list(range(len(lengths)))
    assert batch.wanted == tuple(sum(lengths[: index + 1]) - 1 for index in range(len(lengths)))
    assert batch.decodes == 0


def test_a_whole_model_is_timed_at_every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iterations, "_WARM_UP_S", 0.0)
    grid = Grid(prefill_tokens=(4, 3000), decode_batch=(1, 2), contexts=(8, 16), rounds=1)
    times = measure_whole(TINY, weights("F32"), grid)
    assert times.block is None
    assert len(times.prefill_s) == 2
    assert [len(row) for row in times.decode_s] == [2, 2]
    assert min(times.prefill_s) > 0
