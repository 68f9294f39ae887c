"""Time Hugging Face transformers, compiled and with a static cache, on the shapes of scripts/gpu_check.py: decode steps.

python scripts/gpu_transformers.py [--models 7B] [--batches 1,8,32] [--out results/tables]

A step's time is what generate() adds for each further token, with random weights in 16 bits. Compilation is not counted. Writes
gpu_transformers.csv.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from lambdascale.calibration import engine_rates

_CONTEXT, _FEW, _MANY, _ROUNDS = 512, 8, 40, 3


def model_of(size: str) -> Any:
    """Return a model of random weights on the GPU."""
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(LlamaConfig(**engine_rates.config(size))).eval()
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


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="7B")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--out", type=Path, default=Path("results/tables"))
    arguments = parser.parse_args()
    card = f"1 x {torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in arguments.models.split(","):
        model = model_of(size)
        for batch in map(int, arguments.batches.split(",")):
            row = {"model": size, "batch": batch, "context": _CONTEXT, "ms": 1e3 * step_s(model, batch)}
            print(row, flush=True)
            rows.append(row | {"measured_on": card})
            pd.DataFrame(rows).to_csv(arguments.out / "gpu_transformers.csv", index=False, float_format="%.4g")
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
