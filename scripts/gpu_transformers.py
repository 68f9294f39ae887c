"""Time Hugging Face transformers, compiled, on the shapes of scripts/gpu_check.py: decode steps and prefills.

python scripts/gpu_transformers.py [--models 7B,13B] [--batches 1,8,32] [--prompts 512,2048] [--what decode,eager,compiled]
    [--again] [--out results/tables]

A decode step's time is what generate() adds for each further token, with a static cache. A prefill is a forward pass that keeps
no KV, to the token on the host, as it is and compiled to CUDA graphs (mode reduce-overhead). Weights are random, in 16 bits.
Compilation is not counted. Adds to gpu_transformers.csv what it does not have for this card; --again measures that anew.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from lambdascale.calibration.cards import card
from lambdascale.calibration.random_models import SHAPES, config
from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser

_CONTEXT, _FEW, _MANY, _ROUNDS = 512, 8, 40, 3
_COLUMNS = ("what", "model", "batch", "tokens")


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


Case = tuple[str, str, int, int]
_PREFILLS = {"eager": "prefill, eager", "compiled": "prefill, compiled"}


def cases(size: str, what: list[str], batches: list[int], prompts: list[int]) -> Iterator[Case]:
    """Return what is asked of a model as (what, model, batch, tokens): decode steps, then prefills."""
    if "decode" in what:
        yield from (("decode", size, batch, _CONTEXT) for batch in batches)
    for tokens in prompts:
        yield from ((name, size, 1, tokens) for key, name in _PREFILLS.items() if key in what)


def time_s(model: Any, case: Case) -> float:
    """Return the seconds of a case."""
    what, _, batch, tokens = case
    return step_s(model, batch) if what == "decode" else prefill_s(model, tokens, compiled=what == _PREFILLS["compiled"])


def main() -> None:
    """Measure, print and write."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(SHAPES), help="sizes (default: %(default)s)")
    parser.add_argument("--batches", type=_numbers, default="1,8,32", help="sequences of a decode step (default: %(default)s)")
    parser.add_argument("--prompts", type=_numbers, default="512,2048", help="tokens of a prefill (default: %(default)s)")
    parser.add_argument(
        "--what", default="decode,eager,compiled", help="decode steps, and prefills eager and compiled (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="measure what the table has, too")
    parser.add_argument("--out", type=Path, default=Path("results/tables"), help="folder of the tables (default: %(default)s)")
    arguments = parser.parse_args()
    on = f"{card(count=1)}, torch {torch.__version__}"
    table = arguments.out / "gpu_transformers.csv"
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(table).to_dict("records") if table.exists() else []
    known = {(*(row[column] for column in _COLUMNS), row["measured_on"]): row for row in rows}
    for size in arguments.models.split(","):
        asked = list(cases(size, arguments.what.split(","), arguments.batches, arguments.prompts))
        left = [case for case in asked if arguments.again or (*case, on) not in known]
        model = model_of(size) if left else None
        for case in left:
            row = dict(zip(_COLUMNS, case, strict=True)) | {"ms": 1e3 * time_s(model, case), "measured_on": on}
            print(row, flush=True)
            known[*case, on] = row
            pd.DataFrame(known.values()).to_csv(table, index=False, float_format="%.4g")
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(run_guarded(main))
