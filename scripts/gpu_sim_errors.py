"""Compare what was measured on GPUs with the simulator on their profile, row by row, and write the errors.

python scripts/gpu_sim_errors.py [--profile h200] [--card H200] [--tables results/tables] [--map]

Reads gpu_decode.csv, gpu_prefill.csv, gpu_multicast.csv, gpu_host.csv and gpu_bursts.csv, rows of the card alone. Decode steps
and prefills come from ComputeModel on conf/cluster/measured/PROFILE.yaml, multicasts and broadcasts from the simulated data
plane at the profile's network or the paced rate, own copies from the rate of PCIe, bursts from a simulation of the run. Adds
the profile's rows to gpu_sim_errors.csv. With --map it simulates bursts instead, over models, links, sources, sizes and
answers, with pipelines and without, and writes gpu_map_simulated.csv: from GPUs to four nodes, and from host copies on each of
two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lambdascale.calibration.multicast_runs import CONNECTED, OWN_COPIES
from lambdascale.calibration.random_models import SHAPES
from lambdascale.cli.guard import run_guarded
from lambdascale.cli.multicast import Setting
from lambdascale.cli.parser import Parser
from lambdascale.core import ClusterSpec, ModelSpec, MulticastPlan, UserError
from lambdascale.core.commands import MulticastKind
from lambdascale.core.timing import ComputeModel, Iteration
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.experiments.gpu_bursts import BurstRun, measure
from lambdascale.experiments.gpu_runs import CONFIGURED
from lambdascale.multicast import BinomialPipeline
from lambdascale.sim.measure import multicast_times
from lambdascale.sim.options import TransferOptions

BLOCKS = 16
SETTING = ["tier", "nodes", "sources", "model", "link", "count", "output_tokens"]
# Nodes, sources and rates of the map: from GPUs, over links; from a host copy on each of two nodes, over PCIe.
FROM_GPUS = ("gpu", 4), (1, 2), ("none", "400Gb/s", "100Gb/s", "25Gb/s"), (50, 100, 200, 400)
FROM_HOSTS = ("host", 2), (0,), ("none", "12.5GB/s", "6GB/s", "3GB/s"), (10, 25, 50, 100)
Row = dict[str, Any]


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


def transferred_s(cluster: ClusterSpec, plan: MulticastPlan, sizes: list[int], kind: MulticastKind = "one_sided") -> float:
    """Return the seconds that a multicast takes on an idle simulated cluster, without the set-up of a communicator."""
    times = multicast_times(plan, sizes, replace(cluster, nodes=len(plan.members)), TransferOptions(), multicast=kind)
    return times.total_s - times.setup_s


def multicasts(profile: str, tables: Path, card: str) -> Iterator[Row]:
    """Compare verified multicasts with simulated ones; within a GPU that nodes share, those that are paced."""
    found = measured(tables, "multicast", card)
    found = found[(found.system == "lambdascale") & (found.verification == "digest")]
    found = found[found.paced_gb_per_s.notna() | ~found.measured_on.str.contains("nodes")]
    for each in found.itertuples():
        cluster, spec = specs(profile, each.model)
        paced = not np.isnan(each.paced_gb_per_s)
        if paced:
            cluster = replace(cluster, nic_bytes_per_s=1e9 * each.paced_gb_per_s)
        plan = BinomialPipeline().plan(sources=each.sources, destinations=each.destinations, blocks=BLOCKS)
        sizes = [block.size_bytes for block in spec.partition(BLOCKS)]
        what = f"{each.sources} to {each.destinations}" + (f" at {each.paced_gb_per_s:g} GB/s" if paced else "")
        yield row("multicast", each.model, what, transferred_s(cluster, plan, sizes), each.later_s)


def host_multicasts(profile: str, tables: Path, card: str) -> Iterator[Row]:
    """Compare verified multicasts of a whole host, after the first; broadcasts without the set-up of their communicators.

    Broadcasts that make NCCL's connections are left out: they take several times as long as the bytes.
    """
    found = measured(tables, "host", card)
    found = found[(found.system != "nccl_broadcast") | found.measured_on.str.contains(CONNECTED)]
    found = found[found.verify == "full"]
    for each in found[found.model.isin(list(CONFIGURED))].itertuples():
        cluster, spec = specs(profile, each.model)
        sizes = [block.size_bytes for block in spec.partition(each.blocks)]
        broadcast = not np.isnan(each.without_set_up_s)
        if each.system == OWN_COPIES:
            simulated_s = sum(sizes) / float(cluster.node(0).pcie_bytes_per_s)
        else:
            nodes = each.sources + each.destinations
            planner = Setting(each.system, nodes, "cuda_ipc", "cuda")
            plan = planner.plan(sources=each.sources, destinations=each.destinations, blocks=each.blocks)
            simulated_s = transferred_s(cluster, plan, sizes, "collective" if broadcast else "one_sided")
        what = f"{each.system}, {each.sources} to {each.destinations}, {each.blocks} blocks"
        yield row("host", each.model, what, simulated_s, each.without_set_up_s if broadcast else each.later_s)


def bursts(profile: str, tables: Path, card: str) -> Iterator[Row]:
    """Compare P50 and P90 of TTFT, medians over the bursts of a setting."""
    found = measured(tables, "bursts", card)
    found = found[(found.system == "lambdascale") & ~found.measured_on.str.contains("before")]
    for _, runs in found.groupby([*BurstRun.__dataclass_fields__], sort=False):
        run = replace(BurstRun.of_row(dict(runs.iloc[0].items())), cluster=f"measured/{profile}")
        how = "pipelines" if run.pipelines else "no pipelines"
        start = f"host memory of {run.nodes}" if run.tier == "host" else f"{run.sources} to {run.nodes - run.sources}"
        what = f"{run.link}, {start}, {run.count} requests, {run.output_tokens} tokens, {how}"
        simulated = simulation(run)
        for name in ("p50", "p90"):
            value = float(simulated[f"ttft_{name}_s"])
            yield row("bursts", run.model, f"{what}, {name.upper()}", value, float(runs[f"ttft_{name}_s"].median()))


def simulation(run: BurstRun) -> Row:
    """Simulate a burst; return its measures."""
    return measure(run, run.simulated(BLOCKS))[0]


def mapped(profile: str) -> Iterator[Row]:
    """Simulate bursts with pipelines and without, and yield the seconds that pipelines change the TTFT by."""
    base = BurstRun(
        **{"model": "7B", "system": "lambdascale", "pipelines": True, "nodes": 4, "cluster": f"measured/{profile}"},
        **{"link": "none", "sources": 1, "count": 50, "prompt_tokens": 512, "output_tokens": 16, "kv": "recompute"},
    )
    for (tier, nodes), sources, links, counts in (FROM_GPUS, FROM_HOSTS):
        for values in product(sources, SHAPES, links, counts, (16, 64, 256)):
            setting = dict(zip(SETTING, (tier, nodes, *values), strict=True))
            yield changed(base, setting)


def changed(base: BurstRun, setting: Row) -> Row:
    """Simulate a burst with pipelines and without; return the seconds, and the share of P90, that they change the TTFT by."""
    ours, without = (simulation(replace(base, **setting, pipelines=on)) for on in (True, False))
    found = {f"{name}_s": ours[f"ttft_{name}_s"] - without[f"ttft_{name}_s"] for name in ("p50", "p90")}
    shares = {f"{name}_percent": 100 * found[f"{name}_s"] / without[f"ttft_{name}_s"] for name in ("p50", "p90")}
    return setting | found | shares | {"backend": "sim"}


#: Tables, and what compares them.
COMPARED: dict[tuple[str, ...], Callable[[str, Path, str], Iterator[Row]]] = {
    ("decode", "prefill"): iterations,
    ("multicast",): multicasts,
    ("host",): host_multicasts,
    ("bursts",): bursts,
}


def measured(tables: Path, name: str, card: str) -> pd.DataFrame:
    """Return the rows of a table that were measured on the card."""
    table = pd.read_csv(tables / f"gpu_{name}.csv")
    return table[table.measured_on.str.contains(card)]


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="h200", metavar="NAME", help="of conf/cluster/measured")
    parser.add_argument("--card", default="H200", help="part of measured_on of the rows to compare")
    parser.add_argument("--tables", type=Path, default=Path("results/tables"), help="folder of the tables (default: %(default)s)")
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
    rows: list[Row] = []
    for names, compared in COMPARED.items():
        lacking = [name for name in names if not (arguments.tables / f"gpu_{name}.csv").exists()]
        if lacking:
            print(f"left out: {arguments.tables} has no gpu_{lacking[0]}.csv")
        else:
            rows += compared(*given)
    if not rows:
        raise UserError(f"{arguments.tables} has nothing of {arguments.card} to compare")
    found = pd.DataFrame(rows).assign(profile=arguments.profile)
    path = arguments.tables / "gpu_sim_errors.csv"
    if path.exists():
        before = pd.read_csv(path)
        found = pd.concat([before[before.profile != arguments.profile], found])
    found.to_csv(path, index=False, float_format="%.4g")
    print(found.drop(columns="profile").to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print(found.groupby(["profile", "table"]).error_percent.agg(lambda e: e.abs().mean()).rename("mean absolute error, per cent"))


if __name__ == "__main__":
    sys.exit(run_guarded(main))
