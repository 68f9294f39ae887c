"""Profile this machine and compare the simulator's models with measurements off the profile's grid, in one command.

python scripts/gpu_profile.py --model DIR|NAME [--model DIR|NAME] --out conf/cluster/measured/NAME.yaml [--device cuda]
    [--errors FILE.csv] [--quick]
python scripts/gpu_profile.py --compute 7B,13B --out FILE.yaml

Writes the profile, with the rate of a copy between two GPUs as its network where the machine has two, and a table of errors in
per cent: decode steps and prefills of the whole model beside ComputeModel and, unless the machine has just one
GPU, a multicast beside its plan. With --compute only iterations are measured, of random weights in sizes of Llama 2, 20 s each:
FILE.yaml has them as cluster.compute.measured of a profile, to replace those of an older engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
import yaml
from hydra.utils import instantiate

from lambdascale.calibration import engine_rates, probes
from lambdascale.calibration.cards import card
from lambdascale.calibration.iterations import GPU_GRID, Grid, decode, inputs_of, loaded, measure_whole, prefill, table
from lambdascale.calibration.multicast_rates import link_rate
from lambdascale.calibration.profile import ProfileRequest, measure, ms, plain, provenance, write
from lambdascale.calibration.random_models import COMMAND
from lambdascale.checkpoints import PackedModel
from lambdascale.checkpoints.builtin import NAMES, builtin_model
from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser
from lambdascale.core.timing import ComputeModel
from lambdascale.experiments.gpu_runs import CONFIGURED
from lambdascale.inference import StageBatch, TransformerStage
from lambdascale.live.wire import Pass

QUICK = Grid(prefill_tokens=(8, 64), decode_batch=(1, 4), contexts=(16, 128), rounds=1)
_LONGEST = 2048  # of prompts that prefills are compared on
Row = dict[str, Any]


def row(what: str, size: str, simulated_s: float, measured_s: float) -> Row:
    """Return a row of the table of errors."""
    error = 100 * (simulated_s / measured_s - 1)
    return {"what": what, "size": size, "simulated_s": simulated_s, "measured_s": measured_s, "error_percent": error}


def between(values: tuple[int, ...]) -> list[int]:
    """Return the middles of a grid's intervals, sizes that the profile has no measurement of."""
    return [(low + high) // 2 for low, high in pairwise(values)]


def compute_rows(model: PackedModel, device: str, compute: ComputeModel, grid: Grid) -> Iterator[Row]:
    """Compare decode steps and prefills of the whole model."""
    with loaded(model, device) as weights:
        slots, tokens = max(grid.decode_batch), max(grid.contexts) + 1
        stage = TransformerStage(model.architecture, weights, slots, tokens)
        stage.prepare()
        for count in between(grid.decode_batch):
            for context in between(grid.contexts):
                size = f"batch {count} at {context}"
                yield row("decode", size, simulated(compute, decode(count, context)), timed(stage, decode(count, context)))
        lengths = [count for count in between(grid.prefill_tokens) if count <= _LONGEST]
        del stage
        stage = TransformerStage(model.architecture, weights, 1, max(lengths))
        stage.prepare()
        for count in lengths:
            yield row("prefill", f"{count} tokens", simulated(compute, prefill(count)), timed(stage, prefill(count)))


def simulated(compute: ComputeModel, batch: StageBatch) -> float:
    """Return the seconds of an iteration by the model that simulations use."""
    filled = batch.segments[: len(batch.segments) - batch.decodes]
    context = sum(segment.start for segment in batch.segments[len(filled) :])
    attended = sum(segment.tokens * (segment.tokens + 1) // 2 for segment in filled)
    return compute.iteration_s(Pass(batch, sum(segment.tokens for segment in filled), context, attended, (), ()))


def timed(stage: TransformerStage, batch: StageBatch) -> float:
    """Return the seconds of an iteration on the engine; the first ones do not count."""
    inputs = inputs_of(stage, batch)
    return median([probes.once(lambda: stage.run(batch, inputs), stage.device) for _ in range(8)][3:])


def multicast_rows(model: str, blocks: int, transport: str, nodes: int) -> Iterator[Row]:
    """Compare a multicast from one node to the others, the median of all but the first, with its plan at the link's rate."""
    asked = ["--model", model, "--nodes", str(nodes), "--transport", transport]
    asked += ["--blocks", str(blocks)] if model in NAMES else []  # a packed model has its own
    done = subprocess.run(
        [*COMMAND, "multicast", *asked, "--repeat", "5", "--json"], check=True, stdout=subprocess.PIPE, timeout=150
    )
    found = json.loads(done.stdout)
    yield row("multicast", f"1 to {nodes - 1}, {transport}", found["plan_s"], median(found["seconds"][1:]))


def compute_tables(sizes: list[str], device: torch.device) -> list[dict[str, Any]]:
    """Measure iterations of models of random weights, as the tables of a profile."""
    found = []
    for size in sizes:
        a = engine_rates.architecture(size)
        times = measure_whole(a, engine_rates.random_weights(a, device), GPU_GRID)
        found.append(plain(table(CONFIGURED[size], [times], GPU_GRID)))
        print(f"{size}: {ms(times.prefill_s)}; {' | '.join(ms(row) for row in times.decode_s)}", flush=True)
        torch.cuda.empty_cache()
    return found


def main() -> None:
    """Measure, write and print."""
    parser = Parser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", action="append", help="a packed model or a built-in one's name; repeatable")
    what.add_argument("--compute", metavar="SIZES", help="7B, 13B: measure iterations only")
    parser.add_argument("--blocks", type=int, default=16, help="number of blocks of a built-in model")
    parser.add_argument("--out", type=Path, required=True, help="YAML file to write: conf/cluster/measured/NAME.yaml")
    parser.add_argument("--errors", type=Path, help="default: results/tables/errors_<name of --out>.csv")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="device to compute on (default: %(default)s)")
    parser.add_argument("--disk", type=Path, default=Path("."), help="folder on the disk to measure (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="make fewer and smaller measurements, for a first impression")
    arguments = parser.parse_args()
    card("cuda" if arguments.compute is not None else arguments.device)
    if arguments.compute is not None:
        tables = compute_tables(arguments.compute.split(","), torch.device("cuda:0"))
        arguments.out.write_text(f"# {provenance(torch.device('cuda:0'))}\n" + yaml.safe_dump(tables, sort_keys=False))
        return
    models = [
        builtin_model(name, arguments.blocks) if name in NAMES else PackedModel.open(Path(name)) for name in arguments.model
    ]
    gpus = torch.cuda.device_count() if arguments.device == "cuda" else 0
    grid, mib = (QUICK, 32) if arguments.quick else (GPU_GRID, 512)
    nodes = max(2, min(gpus, 4))
    request = ProfileRequest(
        name=arguments.out.stem,
        models=tuple(models),
        device=arguments.device,
        nodes=nodes,
        disk=arguments.disk,
        disk_mib=mib,
        memory_mib=mib,
        grid=grid,
    )
    profile = measure(request, lambda what: print(f"measuring {what} ...", file=sys.stderr, flush=True))
    if gpus > 1:
        profile.cluster["nic_bytes_per_s"] = link_rate("cuda_ipc")
    write(profile, arguments.out)
    rows = []
    for given, model in zip(arguments.model, models, strict=True):
        compute = ComputeModel(instantiate(profile.cluster, _convert_="all").node(0), model.spec)
        found = list(compute_rows(model, arguments.device, compute, grid))
        if gpus != 1:  # nodes need the memory of the GPU, which this process's weights would take
            found += multicast_rows(given, arguments.blocks, "cuda_ipc" if gpus else "shm", nodes)
        rows += [each | {"model": model.name} for each in found]
    compared = pd.DataFrame(rows).assign(measured_on=profile.provenance)
    errors = arguments.errors or Path("results/tables") / f"errors_{arguments.out.stem}.csv"
    errors.parent.mkdir(parents=True, exist_ok=True)
    compared.to_csv(errors, index=False, float_format="%.4g")
    print(compared.drop(columns="measured_on").to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print(f"wrote {arguments.out} and {errors}")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
