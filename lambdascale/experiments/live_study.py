"""Two studies of the live cluster on one machine: live against simulated, and execute-while-load against load-then-execute.

Each runs the same configuration twice, with another backend or one other setting. Rows name their backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pandas as pd

from lambdascale.experiments.compose import compose
from lambdascale.experiments.folder import SUMMARY, read_json
from lambdascale.experiments.runner import run

SYSTEMS = ("lambdascale", "faasnet", "serverlessllm")
# Links, PCIe and disk in the proportions of the first testbed, so slow that SmolLM2 takes seconds to move.
PACE = ("cluster.nic_bytes_per_s=0.1GB/s", "cluster.pcie_bytes_per_s=0.2GB/s", "cluster.ssd_bytes_per_s=0.05GB/s")
# Three minutes of the bursty generator in a third of the time; answers short enough for half a core per node.
TRACE = (
    "workload=bursty",
    "workload.duration_s=180",
    "workload.time_compression=3",
    "workload.lengths=fixed",
    "workload.prompt_tokens=64",
    "workload.output_tokens=32",
)
MEASURES = ("ttft_p50_s", "ttft_p90_s", "scale_out_s", "gpu_seconds")


@dataclass(frozen=True)
class Case:
    """A live cluster to compare with its simulation."""

    name: str
    nodes: int
    executor: str


CASES = (Case("12 nodes, timed", 12, "timed"), Case("4 nodes, real", 4, "torch"))


def sim_vs_live(
    cluster: str,
    results: str,
    *,
    seeds: Sequence[int] = (1, 2, 3),
    cases: Sequence[Case] = CASES,
    systems: Sequence[str] = SYSTEMS,
    trace: Sequence[str] = TRACE,
) -> pd.DataFrame:
    """Medians over seeds of simulated and live measures, and of the simulator's error (computed per seed) in per cent.

    ``scale_out_s`` is the mean over a run's scale-outs: a median would jump between loads from host memory and from disk.
    ``cluster`` is a profile measured on this machine, as in ``cluster=measured/NAME``. Runs go below the folder ``results``.
    """
    rows = []
    for case in cases:
        for system in systems:
            simulated, live = (
                pd.DataFrame(
                    _measures(_compared([*trace, f"cluster={cluster}", f"results={results}"], case, system, seed, backend))
                    for seed in seeds
                )
                for backend in ("sim", "live")
            )
            errors = 100 * (simulated / live - 1)
            label = "live" if case.executor == "torch" else f"live-{case.executor}"
            for measure in MEASURES:
                values = {"simulated": simulated[measure].median(), "live": live[measure].median()}
                row = {
                    "case": case.name,
                    "system": system,
                    "measure": measure,
                    **values,
                    "error_percent": errors[measure].median(),
                }
                rows.append({**row, "backend": f"sim and {label}"})
    return pd.DataFrame(rows)


def _compared(common: Sequence[str], case: Case, system: str, seed: int, backend: str) -> Path:
    which = ["backend=live", f"backend.executor={case.executor}", "backend.threads=1"] if backend == "live" else ["backend=sim"]
    place = ["model=smollm2", f"cluster.nodes={case.nodes}", *PACE]
    if case.executor == "timed":  # nodes that only wait do not slow each other down
        place.append("++cluster.compute.shared_slowdown=[]")
    return run(compose([*which, *common, *place, f"system={system}", f"seed={seed}", "name=sim_vs_live"])).folder


def _measures(folder: Path) -> dict[str, float]:
    summary = read_json(folder / SUMMARY)
    durations = scale_out_durations(pd.read_parquet(folder / "events.parquet"))
    return {
        "ttft_p50_s": summary["ttft_s"]["p50"],
        "ttft_p90_s": summary["ttft_s"]["p90"],
        "scale_out_s": fmean(durations) if durations else 0.0,
        "gpu_seconds": summary["gpu_seconds"],
    }


def scale_out_durations(events: pd.DataFrame) -> list[float]:
    """Seconds from the start of each multicast or load until its last block has arrived; "instant" loads are excluded."""
    starts = events[events.kind.isin(["StartMulticast", "LoadBlocks"]) & ~events.detail.str.contains('"instant"', na=False)]
    ends = events[events.kind == "BlockArrived"].groupby("transfer_id").at_s.max()
    return [float(ends[t] - at) for t, at in zip(starts.transfer_id, starts.at_s, strict=True) if t in ends.index]


def _medians(found: Iterable[dict[str, float]]) -> dict[str, float]:
    frame = pd.DataFrame(list(found))
    return {str(name): float(value) for name, value in frame.median().items()}


# -- execute-while-load against load-then-execute ------------------------------------------------------------------------

SOURCES = (1, 2, 4)
BURST = (
    "workload=burst",
    "workload.count=50",
    "workload.at_s=0.55",
    "workload.prompt_tokens=16",
    "workload.output_tokens=16",
)
# Eight nodes share this machine: each computes as slowly as when all do, 0.4 s for a decode step of the whole model.
SLOW = ("cluster.gpu.hbm_bytes_per_s=1.36GB/s", "cluster.gpu.peak_flops=2e11", "cluster.nic_bytes_per_s=0.05GB/s")


def execute_while_load(results: str, seeds: Sequence[int] = (1, 2, 3), backend: str = "live") -> pd.DataFrame:
    """Measures of a burst that scales one replica to eight, with and without pipelines; medians over seeds, times in seconds.

    The k sources are one replica and k - 1 host copies. Runs go below the folder ``results``.
    """
    rows = []
    for sources in SOURCES:
        for pipelines in ("ComplementaryPipelines", "NoPipelines"):
            runs = [_burst(results, sources, pipelines, seed, backend) for seed in seeds]
            values = _medians(_burst_measures(folder) for folder in runs)
            label = read_json(runs[0] / SUMMARY)["backend"]
            executes = "while loading" if pipelines == "ComplementaryPipelines" else "after loading"
            rows.append({"sources": sources, "executes": executes, **values, "runs": len(runs), "backend": label})
    return pd.DataFrame(rows)


def _burst(results: str, sources: int, pipelines: str, seed: int, backend: str) -> Path:
    which = ["backend=live", "backend.executor=paced", "backend.threads=1"] if backend == "live" else ["backend=sim"]
    place = ["model=smollm2", "cluster=desk", "cluster.nodes=8", *SLOW]
    system = [f"system.start.pipelines._target_=lambdascale.pipelines.{pipelines}", f"system.start.sources={sources}"]
    copies = [f"system.memory.initial_copies={sources}"]
    rest = [f"seed={seed}", f"results={results}", "name=execute_while_load", *BURST]
    return run(compose([*which, *place, *system, *copies, *rest])).folder


def _burst_measures(folder: Path) -> dict[str, float]:
    requests = pd.read_parquet(folder / "requests.parquet")
    return {
        "ttft_p50_s": float(requests.ttft_s.quantile(0.5)),
        "ttft_p90_s": float(requests.ttft_s.quantile(0.9)),
        "all_served_s": float(requests.ttft_s.max()),
        "first_tokens_of_pipelines": float((requests.first_token_mode == "pipeline").sum()),
    }
