"""Compare what was measured on GPUs with the simulator on their profile, row by row, and write the errors.

python scripts/gpu_sim_errors.py [--profile h200] [--card H200] [--tables results/tables] [--map]

Reads gpu_decode.csv, gpu_prefill.csv, gpu_multicast.csv and gpu_bursts.csv, rows of the card alone. Decode steps and prefills
come from ComputeModel on conf/cluster/measured/PROFILE.yaml, multicasts from their plan at the profile's network or the paced
rate, bursts from a simulation of the run. Adds the profile's rows to gpu_sim_errors.csv. With --map it simulates bursts instead,
over models, links, sources, sizes and answers, with pipelines and without, and writes gpu_map_simulated.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lambdascale.calibration.random_models import SHAPES
from lambdascale.control import build_system, drive
from lambdascale.core import ClusterSpec, ModelSpec
from lambdascale.core.events import Event, RequestArrived, TokensProduced
from lambdascale.core.timing import ComputeModel, Iteration
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.experiments.gpu_runs import CONFIGURED
from lambdascale.multicast import BinomialPipeline

BLOCKS = 16
SETTING = ["model", "link", "sources", "count", "output_tokens", "pipelines"]
Row = dict[str, Any]


class FirstTokens:
    """Observer: seconds from each request's arrival to its first token."""

    def __init__(self) -> None:
        self.arrived: dict[int, float] = {}
        self.ttft: dict[int, float] = {}

    def on_event(self, event: Event) -> None:
        """Note an event."""
        if isinstance(event, RequestArrived):
            self.arrived[event.request.request_id] = event.request.arrival_s
        elif isinstance(event, TokensProduced):
            self.ttft.setdefault(event.request_id, event.at - self.arrived[event.request_id])

    def on_command(self, at: float, command: object) -> None:
        """Note nothing."""


def row(table: str, model: str, what: str, simulated: float, measured: float) -> Row:
    """Return a row of errors."""
    error = 100 * (simulated / measured - 1)
    return {
        "table": table,
        "model": model,
        "what": what,
        "simulated_s": simulated,
        "measured_s": measured,
        "error_percent": error,
    }


def specs(profile: str, model: str) -> tuple[ClusterSpec, ModelSpec]:
    """Return the profile's cluster and a model's sizes."""
    experiment = build(compose([f"cluster=measured/{profile}", f"model={CONFIGURED[model]}", "workload=burst"]))
    return experiment.cluster, experiment.models[0]


def iterations(profile: str, tables: Path, card: str) -> Iterator[Row]:
    """Compare decode steps and prefills of the engine alone: without what a serving node adds to an iteration."""
    models: dict[str, ComputeModel] = {}
    for table in ("decode", "prefill"):
        found = measured(tables, table, card)
        for each in found.itertuples():
            if each.model not in models:
                cluster, spec = specs(profile, each.model)
                alone = replace(cluster, compute=replace(cluster.compute, iteration_overhead_s=0.0))
                models[each.model] = ComputeModel(alone.node(0), spec)
            if table == "decode":
                size, what = Iteration(decodes=each.batch, context_tokens=each.batch * each.context), f"batch {each.batch}"
            else:
                size, what = Iteration(prefill_tokens=each.tokens), f"{each.tokens} tokens"
            yield row(table, each.model, what, models[each.model].iteration_s(size), each.ms / 1e3)


def multicasts(profile: str, tables: Path, card: str) -> Iterator[Row]:
    """Compare verified multicasts with their plans: rounds of the largest block."""
    found = measured(tables, "multicast", card)
    found = found[(found.system == "lambdascale") & (found.verification == "digest")]
    for each in found.itertuples():
        cluster, spec = specs(profile, each.model)
        paced = not np.isnan(each.paced_gb_per_s)
        rate = 1e9 * each.paced_gb_per_s if paced else float(cluster.node(0).nic_bytes_per_s)
        plan = BinomialPipeline().plan(sources=each.sources, destinations=each.destinations, blocks=BLOCKS)
        rounds_s = [max(spec.partition(BLOCKS)[send.block].size_bytes for send in sends) / rate for sends in plan.rounds]
        what = f"{each.sources} to {each.destinations}" + (f" at {each.paced_gb_per_s:g} GB/s" if paced else "")
        yield row("multicast", each.model, what, sum(rounds_s), each.later_s)


def bursts(profile: str, tables: Path, card: str) -> Iterator[Row]:
    """Compare P50 and P90 of TTFT, medians over the runs of a setting."""
    found = measured(tables, "bursts", card)
    found = found[(found.system == "lambdascale") & ~found.measured_on.str.contains("before")]
    for key, runs in found.groupby(SETTING):
        setting = dict(zip(SETTING, key, strict=True))
        ttft = burst(profile, setting, int(runs.prompt_tokens.iloc[0]))
        how = "pipelines" if setting["pipelines"] else "no pipelines"
        what = f"{setting['link']}, {setting['sources']} to {4 - setting['sources']}, {setting['count']} requests, {how}"
        for name, quantile in (("P50", 0.5), ("P90", 0.9)):
            value = float(np.quantile(ttft, quantile))
            yield row("bursts", setting["model"], f"{what}, {name}", value, float(runs[f"ttft_{name.lower()}_s"].median()))


def burst(profile: str, setting: Row, prompt: int) -> list[float]:
    """Simulate a burst of scripts/gpu_bursts.py; return each request's TTFT."""
    paced = [] if setting["link"] == "none" else [f"cluster.nic_bytes_per_s={setting['link']}"]
    if not setting["pipelines"]:
        paced.append("system.start.pipelines._target_=lambdascale.pipelines.NoPipelines")
    experiment = build(
        compose(
            [
                f"cluster=measured/{profile}",
                f"model={CONFIGURED[setting['model']]}",
                "system=lambdascale",
                "system.memory.enabled=false",
                f"system.blocks={BLOCKS}",
                f"system.autoscaler.min_replicas={setting['sources']}",
                "workload=burst",
                f"workload.count={setting['count']}",
                "workload.at_s=1.0",
                f"workload.prompt_tokens={prompt}",
                f"workload.output_tokens={setting['output_tokens']}",
                *paced,
            ]
        )
    )
    requests = experiment.workload.requests(models=[model.name for model in experiment.models], seed=1)
    plane = build_system(experiment.system, cluster=experiment.cluster, models=experiment.models)
    backend = experiment.backend.build(
        cluster=experiment.cluster,
        models=experiment.models,
        requests=requests,
        batching=experiment.system.batching,
        seed=1,
    )
    seen = FirstTokens()
    drive(plane, backend, [seen])
    return list(seen.ttft.values())


def mapped(profile: str) -> Iterator[Row]:
    """Simulate bursts with pipelines and without, and yield the seconds that pipelines change the TTFT by."""
    axes = (SHAPES, ("none", "400Gb/s", "100Gb/s", "25Gb/s"), (1, 2), (50, 100, 200, 400), (16, 64, 256))
    for values in product(*axes):
        setting = dict(zip(SETTING, values, strict=False))
        sides = [burst(profile, setting | {"pipelines": on}, 512) for on in (True, False)]
        found = {
            f"{name}_s": float(np.quantile(sides[0], quantile) - np.quantile(sides[1], quantile))
            for name, quantile in (("p50", 0.5), ("p90", 0.9))
        }
        yield setting | found | {"p90_percent": 100 * found["p90_s"] / float(np.quantile(sides[1], 0.9)), "backend": "sim"}


def measured(tables: Path, name: str, card: str) -> pd.DataFrame:
    """Return the rows of a table that were measured on the card."""
    table = pd.read_csv(tables / f"gpu_{name}.csv")
    return table[table.measured_on.str.contains(card)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="h200", metavar="NAME", help="of conf/cluster/measured")
    parser.add_argument("--card", default="H200", help="part of measured_on of the rows to compare")
    parser.add_argument("--tables", type=Path, default=Path("results/tables"))
    parser.add_argument("--map", action="store_true", help="simulate where pipelines help, and write gpu_map_simulated.csv")
    arguments = parser.parse_args()
    if not arguments.tables.is_dir():
        parser.error(f"--tables: {arguments.tables} is no folder")
    if arguments.map:
        table = pd.DataFrame(mapped(arguments.profile))
        table.to_csv(arguments.tables / "gpu_map_simulated.csv", index=False, float_format="%.4g")
        print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
        return
    given = arguments.profile, arguments.tables, arguments.card
    found = pd.DataFrame([*iterations(*given), *multicasts(*given), *bursts(*given)])
    found = found.assign(profile=arguments.profile)
    path = arguments.tables / "gpu_sim_errors.csv"
    if path.exists():
        before = pd.read_csv(path)
        found = pd.concat([before[before.profile != arguments.profile], found])
    found.to_csv(path, index=False, float_format="%.4g")
    print(found.drop(columns="profile").to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print(found.groupby(["profile", "table"]).error_percent.agg(lambda e: e.abs().mean()).rename("mean absolute error, per cent"))


if __name__ == "__main__":
    main()
