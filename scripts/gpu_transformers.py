"""Time Hugging Face transformers, compiled, on the shapes of scripts/gpu_check.py: decode steps and prefills.

python scripts/gpu_transformers.py [--models 7B,13B] [--batches 1,8,32] [--prompts 512,2048] [--out results/tables]

A decode step's time is what generate() adds for each further token, with a static cache. A prefill is a forward pass that keeps
no KV, to the token on the host, as it is and compiled to CUDA graphs (mode reduce-overhead). Weights are random, in 16 bits.
Compilation is not counted. Writes gpu_transformers.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from lambdascale.calibration.random_models import SHAPES, config

_CONTEXT, _FEW, _MANY, _ROUNDS = 512, 8, 40, 3


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def model_of(size: str) -> Any:
    """Return a model of random weights on the GPU."""
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(LlamaConfig(**config(size))).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def step_s(model: Any, batch: int) -> float:
    """Return the seconds of a decode step around ``_CONTEXT`` tokens: of many tokens less few, over their number."""
    prompt = torch.randint(0, 32000, (batch, _CONTEXT - _FEW), device="cuda")

    def once(tokens: int) -> float:
        settings = GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, cache_implementation="static", pad_token_id=0
        )
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    for tokens in (_MANY, _FEW, _MANY):  # compiles
        once(tokens)
    return median((once(_MANY) - once(_FEW)) / (_MANY - _FEW) for _ in range(_ROUNDS))


def prefill_s(model: Any, tokens: int, *, compiled: bool) -> float:
    """Return the seconds from a prompt to its token on the host."""
    prompt = torch.randint(0, 32000, (1, tokens), device="cuda")
    torch._dynamo.reset()
    forward = torch.compile(model.forward, mode="reduce-overhead", dynamic=False) if compiled else model.forward

    def once() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        forward(input_ids=prompt, use_cache=False, logits_to_keep=1).logits.argmax().item()
        return time.perf_counter() - begin

    for _ in range(3):  # compiles and records
        once()
    return median(once() for _ in range(3 * _ROUNDS))


def rows_of(model: Any, size: str, batches: list[int], prompts: list[int]) -> Iterator[dict[str, Any]]:
    """Measure decode steps of each batch and prefills of each length."""
    for batch in batches:
        yield {"what": "decode", "model": size, "batch": batch, "tokens": _CONTEXT, "ms": 1e3 * step_s(model, batch)}
    for tokens in prompts:
        for compiled in (False, True):
            what = "prefill, compiled" if compiled else "prefill, eager"
            took = prefill_s(model, tokens, compiled=compiled)
            yield {"what": what, "model": size, "batch": 1, "tokens": tokens, "ms": 1e3 * took}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--batches", type=_numbers, default="1,8,32")
    parser.add_argument("--prompts", type=_numbers, default="512,2048")
    parser.add_argument("--out", type=Path, default=Path("results/tables"))
    arguments = parser.parse_args()
    card = f"1 x {torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in arguments.models.split(","):
        model = model_of(size)
        for row in rows_of(model, size, arguments.batches, arguments.prompts):
            print(row, flush=True)
            rows.append(row | {"measured_on": card})
            pd.DataFrame(rows).to_csv(arguments.out / "gpu_transformers.csv", index=False, float_format="%.4g")
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
