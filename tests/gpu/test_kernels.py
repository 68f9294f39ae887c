"""Triton kernels against torch's operators. On a GPU; or, slowly, with TRITON_INTERPRET=1 where Triton is installed."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lambdascale.checkpoints import Architecture
from lambdascale.checkpoints.architecture import parse_architecture
from lambdascale.checkpoints.synthetic import PRESETS
from lambdascale.inference.compiling import rehearse
from lambdascale.inference.fused import TritonOperators, has_triton
from lambdascale.inference.operators import TorchOperators
from lambdascale.inference.scratch import Scratch
from lambdascale.inference.stage import rope_tables
from lambdascale.inference.tiles import MOST_ROWS, Choice, Tile, Tuning

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and has_triton()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available() and not INTERPRETED, reason="needs a GPU")]
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
TOKENS, SLOTS = 160, 40
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
ROWS = [1, 2, 16, 17, 32, 33]


def architecture(heads: int, kv_heads: int, head_dim: int) -> Architecture:
    found = parse_architecture(dict(PRESETS["tiny"]))
    return replace(found, hidden=heads * head_dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim, intermediate=272)


def both(a: Architecture, dtype: torch.dtype) -> tuple[TorchOperators, TritonOperators]:
    tables = rope_tables(a, TOKENS, dtype, DEVICE)
    return TorchOperators(a, tables, Scratch(dtype, DEVICE)), TritonOperators(a, tables, Scratch(dtype, DEVICE))


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    error = (found.float() - wanted.float()).norm() / wanted.float().norm()
    assert error < TOLERANCE[dtype], error


def layer(a: Architecture, dtype: torch.dtype, *, biased: bool) -> Any:
    states = (a.heads + 2 * a.kv_heads) * a.head_dim

    def weight(outputs: int, inputs: int) -> torch.Tensor:
        return (noise(outputs, inputs) / inputs**0.5).to(dtype)

    return SimpleNamespace(
        input_norm=(1 + noise(a.hidden) / 10).to(dtype),
        post_norm=(1 + noise(a.hidden) / 10).to(dtype),
        qkv=weight(states, a.hidden),
        qkv_bias=noise(states, dtype=dtype) if biased else None,
        output=weight(a.hidden, a.hidden),
        output_bias=noise(a.hidden, dtype=dtype) if biased else None,
        gate_up=weight(2 * a.intermediate, a.hidden),
        gate_up_bias=noise(2 * a.intermediate, dtype=dtype) if biased else None,
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_products(rows: int, biased: bool, dtype: torch.dtype) -> None:
    """Outputs and inputs that no tile divides; norms of any size."""
    a = architecture(6, 2, 40)
    reference, fused = both(a, dtype)
    weights, hidden = layer(a, dtype, biased=biased), noise(rows, a.hidden, dtype=dtype) * 3
    near(fused.project(hidden, weights), reference.project(hidden, weights), dtype)
    near(fused.gated(hidden, weights), reference.gated(hidden, weights), dtype)
    one, two = hidden.clone(), hidden.clone()
    for operators, total in ((reference, one), (fused, two)):
        operators.add_product(total, hidden.flip(1).contiguous(), weights.output, weights.output_bias)
    near(two, one, dtype)
    norms = (weights.post_norm, weights.input_norm)
    results = []
    for operators, total in ((reference, one), (fused, two)):
        # Norms that the product before has prepared, and after others.
        x, again = hidden.flip(1).contiguous(), []
        for norm in norms:
            operators.add_product(total, x, weights.output, weights.output_bias, norm)
            made = operators.gated(total, weights) if norm is weights.post_norm else operators.project(total, weights)
            again.append(made.clone())
        results.append(again)
    for found, wanted in zip(*reversed(results), strict=True):
        near(found, wanted, dtype)
    head = noise(257, a.hidden, dtype=dtype)
    logits = fused.logits(hidden, weights.input_norm, head)
    assert logits.dtype is torch.float32
    near(logits, reference.logits(hidden, weights.input_norm, head), dtype)


@pytest.mark.parametrize("rows", [1, 8, 9, 32])
def test_products_with_other_tiles_and_starts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms over sums of 16 outputs instead of 32, and kernels of up to 8 rows that start when those before end."""
    added = (Choice(Tile(16, 16, 256, 4, 5), rows=16), Choice(Tile(32, 32, 256, 4, 4)))
    monkeypatch.setattr(TritonOperators, "tuning", Tuning(added, early_rows=8, triggers=frozenset()))
    test_products(rows, False, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 4, 16), (6, 2, 24), (8, 1, 64), (9, 3, 128)], ids=str)
@pytest.mark.parametrize("rows", [1, 7, MOST_ROWS + 1])
def test_rotation_and_attention(rows: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Slots in any order, contexts of any length, windows; padding attends nothing and leaves nothing."""
    a = architecture(*shape)
    reference, fused = both(a, dtype)
    slots = torch.randperm(SLOTS, device=DEVICE)[:rows]
    positions = torch.randint(0, TOKENS, (rows,), device=DEVICE)
    positions[rows // 2] = TOKENS - 1
    if rows > 2:
        positions[0], positions[-1] = 0, -1
    kv = noise(SLOTS, 2 * a.kv_heads, TOKENS, a.head_dim, dtype=dtype)
    states = noise(rows, a.heads + 2 * a.kv_heads, a.head_dim, dtype=dtype)
    results = []
    for operators in (reference, fused):
        own, cache = states.clone(), kv.clone()
        places = operators.places(slots, positions, padded=True)
        query = operators.rotate(own, places, cache)
        live = positions >= 0
        apart = [operators.attend(query, places, cache, w).clone() for w in (None, 1, 50)]
        once = [operators.rotate_and_attend(states.clone(), places, other := kv.clone(), w).clone() for w in (None, 1, 50)]
        results.append((query[live], cache, *apart, *once, other))
    for found, wanted in zip(results[1], results[0], strict=True):
        near(found, wanted, dtype)
    assert not rows > 2 or not results[1][2][-1].any()
    untouched = torch.ones(SLOTS, TOKENS, dtype=torch.bool, device=DEVICE)
    untouched[slots[live], positions[live]] = False
    assert torch.equal(results[1][1].transpose(1, 2)[untouched], kv.transpose(1, 2)[untouched])


def variants() -> int:
    """Number of kernels compiled in this process so far."""
    from lambdascale.inference import kernels

    made = (getattr(kernels, name) for name in dir(kernels) if name.endswith("_kernel"))
    return sum(len(cache[0]) for kernel in made for cache in kernel.device_caches.values())


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_no_iteration_compiles_anything() -> None:
    """Any number of rows, and places that begin at any row: a kernel that is compiled while serving takes half a second."""
    a, dtype = architecture(8, 4, 64), torch.bfloat16
    rehearse(a, dtype, DEVICE)
    before = variants()
    assert before > 0
    _, operators = both(a, dtype)
    weights, kv = layer(a, dtype, biased=False), noise(SLOTS, 2 * a.kv_heads, TOKENS, a.head_dim, dtype=dtype)
    head = noise(a.vocab, a.hidden, dtype=dtype)
    for rows in (*range(1, 34), 100, 143):
        hidden = noise(rows, a.hidden, dtype=dtype)
        places = torch.zeros(2, rows, dtype=torch.long, device=DEVICE)
        query = operators.rotate(operators.project(hidden, weights), operators.places(places[0], places[1]), kv)
        for begin in {0, rows // 2, rows - 1}:
            operators.attend(query[begin:], operators.places(places[0, begin:], places[1, begin:]), kv, None)
        operators.rotate_and_attend(operators.project(hidden, weights), operators.places(places[0], places[1]), kv, None)
        for norm in (weights.post_norm, None):
            operators.add_product(hidden, query.flatten(1), weights.output, None, norm)
            operators.gated(hidden, weights)
        operators.logits(hidden, weights.input_norm, head)
    assert variants() == before
