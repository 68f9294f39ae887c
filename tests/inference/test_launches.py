"""Launches of a GPU's kernels, with recorders in their place: which may start while the kernel before still runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

import lambdascale.inference
from lambdascale.checkpoints.architecture import parse_architecture
from lambdascale.checkpoints.synthetic import PRESETS
from lambdascale.inference import fused
from lambdascale.inference.scratch import Scratch
from lambdascale.inference.stage import rope_tables
from lambdascale.inference.tiles import TUNED, Choice, Tile

CPU = torch.device("cpu")


class Recorder:
    """A kernel that notes the settings of its launches."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: object) -> Any:
        return lambda *arguments, **settings: self.launches.append(settings)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made: Any = ModuleType("kernels")
    made.STARTS_EARLY = True
    for name in ("linear", "norm", "gate", "rotate", "attend", "join"):
        setattr(made, f"{name}_kernel", Recorder())
    monkeypatch.setitem(sys.modules, "lambdascale.inference.kernels", made)
    monkeypatch.setattr(lambdascale.inference, "kernels", made, raising=False)
    found: ModuleType = made
    return found


def operators(dtype: torch.dtype = torch.float32) -> fused.TritonOperators:
    a = parse_architecture(dict(PRESETS["tiny"]))
    return fused.TritonOperators(a, rope_tables(a, 8, dtype, CPU), Scratch(dtype, CPU))


def step(rows: int) -> None:
    """Launch the kernels of a part of a layer of a decode step, and those of prompts."""
    found = operators()
    a = found.architecture
    states = torch.zeros(rows, a.heads + 2 * a.kv_heads, a.head_dim)
    kv = torch.zeros(rows, 2 * a.kv_heads, 8, a.head_dim)
    places = found.places(torch.arange(rows), torch.zeros(rows, dtype=torch.long))
    found.rotate(states, places, kv)
    found.rotate_and_attend(states, places, kv, None)
    weight = torch.zeros(a.hidden, a.hidden)
    found.add_product(torch.zeros(rows, a.hidden), torch.zeros(rows, a.hidden), weight, None)


@pytest.mark.parametrize(("able", "rows", "early"), [(True, 1, True), (True, 32, True), (True, 33, False), (False, 1, False)])
def test_kernels_of_few_rows_start_early(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, able: bool, rows: int, early: bool
) -> None:
    """The kernel waits in code exactly where the launch lets it start: otherwise it would read what is not written yet."""
    monkeypatch.setattr(fused, "can_start_early", lambda device: able)
    step(rows)
    for name in ("rotate", "attend", "join", *(["linear"] if rows <= 32 else [])):  # larger products are cuBLAS's
        (settings,) = getattr(kernels, f"{name}_kernel").launches
        assert (settings["EARLY"], settings.get("launch_pdl", False)) == (early, early)
        assert settings.get("TRIGGERS", False) == (early and name != "rotate")


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_other_kernels_let_the_next_one_start(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Kernels that trigger are launched to wait, too: the one after the next relies on that."""
    monkeypatch.setattr(fused, "can_start_early", lambda device: True)
    monkeypatch.setattr(fused.TritonOperators, "tuning", replace(TUNED, early_rows=8, triggers=frozenset({"join"})))
    step(rows)
    early = [
        {name for name in ("attend", "join", "linear") if getattr(kernels, f"{name}_kernel").launches[0][setting]}
        for setting in ("EARLY", "TRIGGERS")
    ]
    assert early == ([{"attend", "join", "linear"}, {"join"}] if rows <= 8 else [set(), set()])


def test_an_older_triton_starts_nothing_early(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.STARTS_EARLY = False
    monkeypatch.setattr(fused, "can_start_early", lambda device: True)
    step(1)
    assert all("launch_pdl" not in settings for settings in kernels.attend_kernel.launches)


def test_contexts_that_are_not_divided_are_not_joined(kernels: Any) -> None:
    step(200)
    assert kernels.attend_kernel.launches[0]["WHOLE"]
    assert not kernels.join_kernel.launches


def test_a_norm_sums_the_parts_that_products_leave(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of a product leaves one sum for its outputs, however many a tile has."""
    few = replace(TUNED, added=(Choice(Tile(16, 16, 256, 4, 5)),))
    monkeypatch.setattr(fused.TritonOperators, "tuning", few)
    found = operators()
    a = found.architecture
    hidden, weight, norm = torch.zeros(2, a.hidden), torch.zeros(a.hidden, a.hidden), torch.ones(a.hidden)
    found.norm(hidden, norm)
    found.add_product(hidden, hidden, weight, None, norm)
    found.logits(hidden, norm, weight)
    assert [launch["SUMMED"] for launch in kernels.norm_kernel.launches + kernels.linear_kernel.launches] == [16, 16, 16]
    assert kernels.linear_kernel.launches[0]["BLOCK_N"] == 16
    assert kernels.linear_kernel.launches[1]["BLOCK_S"] == a.hidden // 16


@pytest.mark.parametrize(("dtype", "norms"), [(torch.bfloat16, [0, 0, 1, 2, 3]), (torch.float16, [1, 2, 3, 4, 5])], ids=str)
def test_a_product_prepares_the_norm_of_its_sum(kernels: Any, dtype: torch.dtype, norms: list[int]) -> None:
    """The norm of that sum by those weights only, until the memory holds another. In float16 the product might overflow."""
    found = operators(dtype)
    a = found.architecture
    hidden, weight = torch.zeros(2, a.hidden, dtype=dtype), torch.zeros(a.hidden, a.hidden, dtype=dtype)
    norm, other = torch.ones(a.hidden, dtype=dtype), torch.ones(a.hidden, dtype=dtype)
    counts = []
    found.add_product(hidden, hidden, weight, None, norm)
    for given, by in ((hidden, norm), (hidden, norm), (hidden.clone(), norm), (hidden, norm)):
        found.logits(given, by, weight)
        counts.append(len(kernels.norm_kernel.launches))
    found.add_product(hidden, hidden, weight, None, norm)
    found.logits(hidden, other, weight)
    counts.append(len(kernels.norm_kernel.launches))
    assert counts == norms
    assert [launch["PREPARES"] for launch in kernels.linear_kernel.launches].count(True) == (2 if norms[0] == 0 else 0)
