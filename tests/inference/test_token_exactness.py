"""Greedy answers token by token as transformers gives them, whatever the batch, the split and the moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.checkpoints import HfCheckpoint, PackedModel, pack
from lambdascale.control import BatchLimits
from lambdascale.inference import (
    BlockWeights,
    Engine,
    Sampling,
    Segment,
    StageBatch,
    Ticket,
    TransformerStage,
    load_blocks,
    warm_up,
)
from lambdascale.inference.warmup import rehearse_prompts

from .conftest import VARIANTS, Answer

TOKENS = 64
SLOT_TOKENS = 256


def prompts(count: int = 20, vocab: int = 256) -> list[list[int]]:
    """Prompts of lengths 1, 2, 3, 5, 8, ... and others between, up to about 120 tokens."""
    generator = torch.Generator().manual_seed(11)
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 4, 7, 16, 17, 31, 64, 65, 97, 111, 120][:count]
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def engine(
    blocks: Sequence[BlockWeights],
    source: HfCheckpoint | PackedModel,
    split: Sequence[int],
    *,
    kv_tokens: int | None = None,
    **limits: Any,
) -> Engine:
    """An engine whose stages have the given numbers of blocks."""
    limits = {"max_batch": 8, "max_tokens": 64} | limits
    stages, first = [], 0
    for count in split:
        stages.append(TransformerStage(source.architecture, blocks[first : first + count], limits["max_batch"], SLOT_TOKENS))
        first += count
    return Engine(stages, BatchLimits(**limits), kv_tokens)


def tickets(asked: Iterable[Sequence[int]], tokens: int = TOKENS) -> list[Ticket]:
    return [Ticket(index, list(prompt), len(prompt), tokens) for index, prompt in enumerate(asked)]


def run(running: Engine) -> None:
    for _ in range(10_000):
        if not len(running):
            return
        running.step()
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture(variant: str, models: Callable[[str], Path], answers: Answer) -> None:
    asked = prompts()
    wanted = answers(models(variant), asked, TOKENS)
    source = HfCheckpoint(models(variant))
    running = engine(load_blocks(source, 4), source, [4])
    sent = tickets(asked)
    for ticket in sent:
        running.add(ticket)
    run(running)
    assert [ticket.output for ticket in sent] == wanted


@pytest.mark.parametrize("variant", ["llama", "llama_tied", "qwen2_window", "mistral"])
def test_logits_are_within_a_ten_thousandth(
    variant: str, models: Callable[[str], Path], reference: Callable[[Path], Any]
) -> None:
    source = HfCheckpoint(models(variant))
    stage = TransformerStage(source.architecture, load_blocks(source), 1, SLOT_TOKENS)
    ids = torch.tensor(prompts()[-1])
    ours = stage.run(StageBatch((Segment(0, 0, len(ids)),), 0, tuple(range(len(ids)))), ids)
    with torch.inference_mode():
        theirs = reference(models(variant))(ids[None]).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def splits(blocks: int) -> list[list[int]]:
    """All ways to cut ``blocks`` blocks into stages."""
    return [[blocks]] + [[*rest, last] for last in range(1, blocks) for rest in splits(blocks - last)]


@pytest.mark.parametrize("split", [*splits(4), [1] * 8, [3, 1, 4]], ids=str)
def test_every_split_into_stages(split: list[int], models: Callable[[str], Path], answers: Answer, tmp_path: Path) -> None:
    asked = prompts()
    wanted = answers(models("llama_tied"), asked, TOKENS)
    pack(models("llama_tied"), tmp_path / "packed", sum(split))
    source = PackedModel.open(tmp_path / "packed")
    running = engine(load_blocks(source), source, split)
    sent = tickets(asked)
    for ticket in sent:
        running.add(ticket)
    run(running)
    assert [ticket.output for ticket in sent] == wanted


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_mixture(data: st.DataObject, models: Callable[[str], Path], answers: Answer) -> None:
    """Requests that come at any time, in any batch size, token budget and KV memory, continuous or static."""
    asked = prompts(8)
    wanted = answers(models("llama"), asked, TOKENS)
    source = HfCheckpoint(models("llama"))
    max_batch = data.draw(st.integers(1, 5))
    mode = data.draw(st.sampled_from(["continuous", "static"]))
    limits = {"max_batch": max_batch, "max_tokens": data.draw(st.integers(max_batch, 40)), "mode": mode}
    limits["kv_tokens"] = data.draw(st.none() | st.integers(98, 250))  # the longest request has 34 + 64
    running = engine(load_blocks(source, 2), source, [1, 1], **limits)
    order = data.draw(st.permutations(range(len(asked))))
    sent = dict(enumerate(tickets(asked)))
    for index in order:
        for _ in range(data.draw(st.integers(0, 20))):
            running.step()
        running.add(sent[index])
    run(running)
    assert [sent[index].output for index in range(len(asked))] == wanted


@pytest.mark.parametrize("copied", [False, True], ids=["recomputed", "copied"])
@pytest.mark.parametrize("variant", ["llama", "qwen2_window"])
def test_a_move_at_any_token(variant: str, copied: bool, models: Callable[[str], Path], answers: Answer) -> None:
    """Requests move from a pipeline of four stages to a single node after every possible number of tokens."""
    asked = prompts(12)[-1:] + prompts(5)[-1:]
    wanted = answers(models(variant), asked, TOKENS)
    source = HfCheckpoint(models(variant))
    blocks = load_blocks(source, 4)
    for after in range(1, TOKENS):
        pipeline, alone = engine(blocks, source, [1, 1, 1, 1]), engine(blocks, source, [4])
        sent = tickets(asked)
        for ticket in sent:
            pipeline.add(ticket)
        while sent[0].produced < after:
            pipeline.step()
        for request_id in (0, 1):
            ticket, kv = pipeline.take(request_id, with_kv=copied)
            assert (kv is not None) == copied
            alone.add(ticket, None if kv is None else [torch.cat(kv, dim=1)])
        assert len(pipeline) == 0
        run(alone)
        assert [ticket.output for ticket in sent] == wanted, f"moved after {after} tokens"


@pytest.mark.parametrize("kv_tokens", [184, 250, 500])
@pytest.mark.parametrize("variant", ["llama", "qwen2_window"])
def test_preempted_requests_go_on_where_they_were(
    variant: str, kv_tokens: int, models: Callable[[str], Path], answers: Answer
) -> None:
    """Memory for one request at its longest (120 + 64 tokens), or a few: those that came last are computed anew, repeatedly."""
    asked = prompts()
    wanted = answers(models(variant), asked, TOKENS)
    source = HfCheckpoint(models(variant))
    running = engine(load_blocks(source, 4), source, [1, 3], kv_tokens=kv_tokens)
    sent = tickets(asked)
    for ticket in sent:
        running.add(ticket)
    run(running)
    assert running.batch.preemptions > 3
    assert [ticket.output for ticket in sent] == wanted


def test_sampled_answers_do_not_depend_on_preemptions(models: Callable[[str], Path]) -> None:
    """A draw depends on the seed and the place in the answer. Rounding differs with the batch: it moves about one draw in a
    thousand, of these flat distributions, to the next token.
    """
    source = HfCheckpoint(models("llama"))
    found = []
    for kv_tokens in (None, 200):
        running = engine(load_blocks(source, 4), source, [4], kv_tokens=kv_tokens)
        sent = [
            Ticket(index, list(prompt), len(prompt), TOKENS, Sampling(temperature=1.0, seed=index))
            for index, prompt in enumerate(prompts())
        ]
        for ticket in sent:
            running.add(ticket)
        run(running)
        assert (running.batch.preemptions > 9) == (kv_tokens is not None)
        found.append([ticket.output for ticket in sent])
    assert sum(one == two for one, two in zip(*found, strict=True)) >= len(sent) - 2


def test_kv_may_arrive_when_every_slot_is_taken(models: Callable[[str], Path], answers: Answer) -> None:
    asked = prompts(6)
    wanted = answers(models("llama"), asked, TOKENS)
    source = HfCheckpoint(models("llama"))
    blocks = load_blocks(source)
    one, two = engine(blocks, source, [1], max_batch=2), engine(blocks, source, [1], max_batch=2)
    sent = tickets(asked)
    for ticket in sent[:3]:
        two.add(ticket)
    for ticket in sent[3:]:
        one.add(ticket)
    for _ in range(5):
        one.step()
        two.step()
    for ticket in sent[3:5]:
        two.add(*one.take(ticket.request_id, with_kv=True))
    run(one)
    run(two)
    assert [ticket.output for ticket in sent] == wanted


@pytest.mark.parametrize(("dtype", "name", "tolerance"), [("BF16", torch.bfloat16, 0.3), ("F16", torch.float16, 0.04)])
def test_half_precision_is_as_close_as_transformers_is(
    dtype: str, name: torch.dtype, tolerance: float, models: Callable[[str], Path], reference: Callable[[Path], Any]
) -> None:
    """Stated tolerance, for logits of spread 3: the engine in half precision against transformers in float32."""
    source = HfCheckpoint(models("llama"))
    stage = TransformerStage(source.architecture, load_blocks(source, 2, dtype), 1, SLOT_TOKENS)
    assert stage.dtype == name
    ids = torch.tensor(prompts()[-1])
    ours = stage.run(StageBatch((Segment(0, 0, len(ids)),), 0, tuple(range(len(ids)))), ids)
    with torch.inference_mode():
        theirs = reference(models("llama"))(ids[None]).logits[0]
    assert (ours - theirs).abs().max() < tolerance


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_device_is_warmed_up_with_any_model(blocks: int, models: Callable[[str], Path], tmp_path: Path) -> None:
    """Tied embeddings and one block for all are the odd cases."""
    pack(models("llama_tied"), tmp_path / "packed", blocks)
    warm_up(PackedModel.open(tmp_path / "packed"), "cpu")
    rehearse_prompts(PackedModel.open(tmp_path / "packed"), "cpu", kernels=False)
