"""Parts of a stage: kernels chosen by processor, norms, and which rows reach the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from lambdascale.checkpoints import HfCheckpoint
from lambdascale.inference import Segment, StageBatch, TransformerStage, load_blocks
from lambdascale.inference import linear as kernels
from lambdascale.inference.linear import choose_kernel
from lambdascale.inference.operators import rms_norm

MIXED = (Segment(0, 0, 5), Segment(1, 0, 3), Segment(2, 0, 1), Segment(3, 0, 1))


@pytest.fixture
def stage(models: Callable[[str], Path]) -> TransformerStage:
    source = HfCheckpoint(models("llama3"))
    return TransformerStage(source.architecture, load_blocks(source, 1), 4, 32)


def logits(stage: TransformerStage, wanted: tuple[int, ...]) -> torch.Tensor:
    return stage.run(StageBatch(MIXED, 2, wanted), torch.arange(10))


def test_the_kernel_follows_the_processors_maker() -> None:
    assert choose_kernel("vendor_id : GenuineIntel", has_mkl=True) is None
    if torch.backends.mkldnn.is_available():
        assert choose_kernel("vendor_id : GenuineIntel", has_mkl=False) is not None
        assert choose_kernel("vendor_id : AuthenticAMD", has_mkl=True) is not None


@pytest.mark.parametrize("blas", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_memory_for_a_product_changes_nothing(monkeypatch: pytest.MonkeyPatch, blas: bool, biased: bool) -> None:
    if blas:
        monkeypatch.setattr(kernels, "_ONEDNN", None)
    x, weight = torch.randn(5, 64), torch.randn(96, 64)
    bias = torch.randn(96) if biased else None
    out = torch.full((5, 96), float("nan"))
    result = kernels.linear(x, weight, bias, out)
    assert torch.allclose(result, functional.linear(x, weight, bias), atol=1e-4)
    assert not blas or result.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("wanted", [(4, 7, 8, 9), (7,), (0, 2, 4), (8,), (4, 9)])
def test_rows_nobody_asked_for_do_not_change_those_asked_for(stage: TransformerStage, wanted: tuple[int, ...]) -> None:
    everything = logits(stage, tuple(range(10)))
    assert torch.allclose(logits(stage, wanted), everything[list(wanted)], atol=1e-5)


def test_an_iteration_that_gives_no_token_leaves_its_keys(stage: TransformerStage) -> None:
    whole = stage.run(StageBatch((Segment(0, 0, 8),), 0, (7,)), torch.arange(8))
    assert stage.run(StageBatch((Segment(1, 0, 5),), 0, ()), torch.arange(5)).shape == (0, whole.shape[1])
    rest = stage.run(StageBatch((Segment(1, 5, 3),), 0, (2,)), torch.arange(5, 8))
    assert torch.allclose(rest, whole, atol=1e-5)


def test_inputs_are_left_as_they_were(models: Callable[[str], Path]) -> None:
    source = HfCheckpoint(models("llama3"))
    last = TransformerStage(source.architecture, load_blocks(source, 2)[1:], 1, 32)
    states = torch.randn(4, source.architecture.hidden)
    before = states.clone()
    last.run(StageBatch((Segment(0, 0, 4),), 0, (3,)), states)
    assert torch.equal(states, before)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_norms_are_torchs(size: float) -> None:
    x, weight = torch.randn(5, 64) * size, torch.rand(64)
    assert torch.allclose(rms_norm(x, weight, 1e-5), functional.rms_norm(x, (64,), weight, 1e-5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", ["llama3", "mistral"])
@pytest.mark.parametrize("slots", [(0, 1, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0), (0, 2, 1, 3)])
def test_prefills_attended_together_give_what_each_gives_alone(
    models: Callable[[str], Path], variant: str, slots: tuple[int, ...]
) -> None:
    source = HfCheckpoint(models(variant))
    together, alone = (TransformerStage(source.architecture, load_blocks(source, 1), 4, 64) for _ in range(2))
    for start, tokens in ((0, 20), (20, 6)):
        # The last is a token shorter: alike in its start only.
        lengths = [tokens, tokens, tokens, tokens - 1]
        ids = [torch.arange(length) * 7 + 31 * slot for slot, length in zip(slots, lengths, strict=True)]
        segments = tuple(Segment(slot, start, length) for slot, length in zip(slots, lengths, strict=True))
        found = together.run(StageBatch(segments, 0, tuple(range(sum(lengths)))), torch.cat(ids))
        wanted = [
            alone.run(StageBatch((segment,), 0, tuple(range(segment.tokens))), own)
            for segment, own in zip(segments, ids, strict=True)
        ]
        assert torch.allclose(found, torch.cat(wanted), atol=1e-4)
