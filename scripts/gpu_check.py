"""Measure the engine, digests and multicasts on this machine's GPUs, each beside its limit, in less than ten minutes.

python scripts/gpu_check.py [--out results/tables] [--only decode,prefill,digest,tokens,multicast] [--models 7B,13B]
    [--memory /dev/shm]

Writes gpu_decode.csv, gpu_prefill.csv, gpu_digest.csv and, for the first model, gpu_tokens.csv; with more than one GPU also
gpu_multicast.csv, for which it packs a random 7B model (14 GB) under --memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from lambdascale.calibration import engine_rates, probes
from lambdascale.calibration.cards import card
from lambdascale.calibration.divergence import divergence_rows
from lambdascale.calibration.engine_rates import Row
from lambdascale.calibration.random_models import COMMAND, SHAPES, packed
from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser
from lambdascale.inference import TransformerStage

ALL = ("decode", "prefill", "digest", "tokens", "multicast")
BATCHES, CONTEXT, PROMPTS = (1, 8, 32), 512, (512, 2048)


def engine(device: torch.device, model: str, read_rate: float, only: set[str]) -> Iterator[tuple[str, Row]]:
    """Return rows of decode and prefill, by table."""
    a = engine_rates.architecture(model)
    weights = engine_rates.random_weights(a, device)
    if "decode" in only:
        stage = TransformerStage(a, weights, max(BATCHES), 2 * CONTEXT)
        yield from (("decode", row) for row in engine_rates.decode_rows(model, stage, read_rate, BATCHES, CONTEXT))
        del stage
    if "prefill" in only:
        stage = TransformerStage(a, weights, 1, max(PROMPTS) + 1)
        yield from (("prefill", row) for row in engine_rates.prefill_rows(model, stage, PROMPTS))


def multicasts(memory: Path, repeat: int = 5) -> Iterator[tuple[str, Row]]:
    """Time verified multicasts of a 7B model from one GPU to the others, and from half of them to the other half."""
    gpus = torch.cuda.device_count()
    with TemporaryDirectory(dir=memory) as scratch:
        model = packed(["7B"], Path(scratch), engine_rates.BLOCKS)["7B"]
        for sources in sorted({1, max(1, gpus // 2)}):
            asked = ["--nodes", str(gpus), "--sources", str(sources), "--transport", "cuda_ipc", "--repeat", str(repeat)]
            done = subprocess.run(
                [*COMMAND, "multicast", "--model", str(model), *asked, "--json"], check=True, capture_output=True
            )
            found = json.loads(done.stdout)
            first, *later = found["seconds"]
            yield (
                "multicast",
                {
                    "model": "7B",
                    "sources": sources,
                    "destinations": gpus - sources,
                    "first_s": first,
                    "later_s": sorted(later)[len(later) // 2],
                    "plan_s": found["plan_s"],
                    "link_gb_per_s": found["link_bytes_per_s"] / 1e9,
                },
            )


def rows(arguments: argparse.Namespace, only: set[str]) -> Iterator[tuple[str, Row]]:
    """Return all rows, by table."""
    device = torch.device("cuda:0")
    read_rate = probes.memory_rate(4 << 30, device)
    if "digest" in only:
        yield from (("digest", row) for row in engine_rates.digest_rows(device, read_rate))
    for model in arguments.models.split(",") if only & {"decode", "prefill"} else ():
        yield from engine(device, model, read_rate, only)
        torch.cuda.empty_cache()
    if "tokens" in only:
        name = arguments.models.split(",")[0]
        a = engine_rates.architecture(name)
        yield from (("tokens", row) for row in divergence_rows(name, a, engine_rates.random_weights(a, device)))
        torch.cuda.empty_cache()
    if "multicast" in only and torch.cuda.device_count() > 1:
        yield from multicasts(arguments.memory)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/tables"), help="folder of the tables (default: %(default)s)")
    parser.add_argument("--only", default=",".join(ALL), help="parts to measure (default: %(default)s)")
    parser.add_argument("--models", default=",".join(SHAPES), help="sizes (default: %(default)s)")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="folder for packed models (default: %(default)s)")
    arguments = parser.parse_args()
    for option, known in (("only", ALL), ("models", SHAPES)):
        if strange := set(getattr(arguments, option).split(",")).difference(known):
            parser.error(f"--{option} has {sorted(strange)[0]}; it may have {', '.join(known)}")
    on = f"{card()}, torch {torch.__version__}"
    tables: dict[str, list[Row]] = {}
    for table, row in rows(arguments, set(arguments.only.split(","))):
        print(table, {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        tables.setdefault(table, []).append(row | {"measured_on": on})
    arguments.out.mkdir(parents=True, exist_ok=True)
    for table, found in tables.items():
        pd.DataFrame(found).to_csv(arguments.out / f"gpu_{table}.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
