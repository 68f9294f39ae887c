"""KV memory: zero to begin with, and paid for only where it is used."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import torch

from lambdascale.checkpoints import HfCheckpoint
from lambdascale.inference.kv_cache import KvCache


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_slot_costs_the_pages_it_uses(models: Callable[[str], Path]) -> None:
    """A huge page for every place where a sequence begins would take most of the memory, and 0.3 s, with the first token."""
    architecture = HfCheckpoint(models("llama")).architecture
    cache = KvCache(architecture, 32, 4, 16384, torch.float32, torch.device("cpu"))
    assert cache.both.numel() * 4 > 256 << 20
    before = resident_bytes()
    assert not cache.read(0, 1).any()
    cache.write(0, torch.ones(2, 32, architecture.kv_heads, 1, architecture.head_dim))
    assert resident_bytes() - before < 16 << 20
    assert cache.keys[:, 0, :, 0].all()
    assert cache.values[:, 0, :, 0].all()
    assert not cache.both[:, 1, :, 0].any()


def test_kv_of_some_layers_goes_from_one_stage_to_another(models: Callable[[str], Path]) -> None:
    """Layers 2 and 3 of one cache become layers 0 and 1 of another; nothing else changes."""
    architecture = HfCheckpoint(models("llama")).architecture
    whole, part = (KvCache(architecture, layers, 2, 16, torch.float32, torch.device("cpu")) for layers in (4, 3))
    whole.both.copy_(torch.arange(whole.both.numel()).view(whole.both.shape))
    part.write(1, whole.read(0, 5, slice(2, 4)), slice(0, 2))
    assert torch.equal(part.both[:2, 1, :, :5], whole.both[2:, 0, :, :5])
    assert not part.both[2].any()
    assert not part.both[:, 0].any()
    assert not part.both[:, 1, :, 5:].any()
