"""Speed of the engine on one GPU beside its limits: decode beside reading, prefill beside matrix products, digests.

The weights are random and made on the GPU: no file, no store. A row is a dict with its limit, measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from lambdascale.calibration import probes
from lambdascale.calibration.iterations import decode, prefill
from lambdascale.calibration.random_models import config
from lambdascale.checkpoints import Architecture, block_layouts, parse_architecture
from lambdascale.checkpoints.convert import TORCH_TYPES
from lambdascale.inference import BlockWeights, TransformerStage
from lambdascale.inference.digest import part_digests
from lambdascale.inference.forms import Form
from lambdascale.inference.sampling import GREEDY

Tensor = torch.Tensor
Row = dict[str, Any]
DTYPE = "BF16"
BLOCKS = 16


def architecture(model: str) -> Architecture:
    """Return the architecture of Llama 2 in a size of SHAPES."""
    return parse_architecture(config(model))


def random_weights(a: Architecture, device: torch.device, dtype: str = DTYPE) -> list[BlockWeights]:
    """Return blocks of random weights, of a spread that keeps hidden states finite through any number of layers."""
    blocks = []
    for layout in block_layouts(a, dtype, BLOCKS):
        buffer = torch.empty(layout.size_bytes, dtype=torch.uint8, device=device)
        buffer.view(TORCH_TYPES[dtype]).normal_(0, 0.3 / a.hidden**0.5)
        blocks.append(BlockWeights(layout, buffer))
    return blocks


def decode_rows(model: str, stage: TransformerStage, read_rate: float, batches: tuple[int, ...], context: int) -> Iterator[Row]:
    """Return ms per decode step of each batch at ``context``, beside the time to read weights and KV at ``read_rate``.

    A step is timed on the host, from token to token.
    """
    a = stage.architecture
    weights = sum(block.layout.size_bytes for block in stage.blocks) - a.vocab * a.hidden * stage.dtype.itemsize  # the embedding
    for batch in batches:
        kv = batch * context * stage.kv.both[:, 0, :, 0].numel() * stage.dtype.itemsize
        floor = (weights + kv) / read_rate
        step = median(_steps(stage, batch, context))
        yield {
            "model": model,
            "batch": batch,
            "context": context,
            "ms": 1e3 * step,
            "floor_ms": 1e3 * floor,
            "of_floor": floor / step,
        }


def _steps(stage: TransformerStage, batch: int, context: int, rounds: int = 30) -> list[float]:
    """Return the seconds of each step, with greedy tokens fed back. The first steps, which prepare kernels, are left out."""
    stage.prepare([Form(batch)])
    tokens, times = torch.arange(batch), []
    for index in range(rounds):
        begin = time.perf_counter()
        tokens = torch.tensor(stage.answer(decode(batch, context + index), tokens, [GREEDY] * batch, [0] * batch))
        times.append(time.perf_counter() - begin)
    return times[5:]


def _first_token(stage: TransformerStage, prompt: torch.Tensor) -> None:
    """Compute the token after a prompt and wait for it on the host."""
    stage.answer(prefill(len(prompt)), prompt, [GREEDY], [0])


def prefill_rows(model: str, stage: TransformerStage, lengths: tuple[int, ...]) -> Iterator[Row]:
    """Return ms from a prompt to its token on the host, beside those of the matrix products of its layers alone.

    Prompts that replicas record in spare time are replayed.
    """
    for tokens in lengths:
        stage.prepare_for(prefill(tokens))
        took = probes.seconds(partial(_first_token, stage, torch.arange(tokens)), stage.device)
        products = probes.seconds(_products(stage, tokens), stage.device)
        yield {"model": model, "tokens": tokens, "ms": 1e3 * took, "products_ms": 1e3 * products, "ratio": took / products}


def _products(stage: TransformerStage, tokens: int) -> Callable[[], None]:
    """Compute every matrix product of a prefill; the head's for the last row only."""
    layers = [layer for block in stage.blocks for layer in block.layers]
    inputs = {
        width: torch.randn(tokens, width, device=stage.device, dtype=stage.dtype)
        for width in {weight.shape[1] for layer in layers for weight in (layer.qkv, layer.output, layer.gate_up, layer.down)}
    }

    def run() -> None:
        for layer in layers:
            for weight in (layer.qkv, layer.output, layer.gate_up, layer.down):
                functional.linear(inputs[weight.shape[1]], weight)

    return run


def digest_rows(device: torch.device, read_rate: float, size_bytes: int = 1 << 30) -> Iterator[Row]:
    """Return GB/s of digests on the GPU beside its read rate, and of one CPU thread (with xxh3, as packing does)."""
    data = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, device=device)
    rate = size_bytes / probes.seconds(lambda: part_digests(data), device)
    yield {"where": "gpu", "gb_per_s": rate / 1e9, "limit_gb_per_s": read_rate / 1e9, "of_limit": rate / read_rate}
    host = data[: size_bytes // 8].cpu()
    rate = len(host) / probes.seconds(lambda: part_digests(host), torch.device("cpu"), 3)
    copied = probes.copy_rate(len(host))
    yield {"where": "cpu thread", "gb_per_s": rate / 1e9, "limit_gb_per_s": copied / 1e9, "of_limit": rate / copied}
