"""The trace experiments: the authors' 30-minute trace and the Azure conversation trace, all systems. Simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lambdascale.experiments.compose import compose
from lambdascale.experiments.multicast_study import PLACES
from lambdascale.experiments.runner import RunResult, run

SYSTEMS = ("lambdascale", "faasnet", "nccl_broadcast", "serverlessllm", "serverlessllm_prototype", "ideal")
# How the authors sped their trace up for each model (shared with the reference, section on traces).
COMPRESSION = {"llama2_7b": 6.0, "llama2_13b": 3.0, "llama2_70b": 1.5}
SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class TraceRun:
    """A finished run and what distinguishes it."""

    trace: str
    model: str
    system: str
    seed: int
    result: RunResult


def run_traces(arrivals: Path, azure: Path, results: str, seeds: Sequence[int] = SEEDS) -> list[TraceRun]:
    """All systems on all traces; finished runs are reused. Only NCCL's set-up depends on the seed."""
    runs = []
    for model, place in PLACES.items():
        base = [f"model={model}", f"cluster={place}", f"results={results}"]
        paper = ["experiment=paper_trace", f"workload.path={arrivals}", *base]
        cases = {
            "authors_compressed": [*paper, f"workload.time_compression={COMPRESSION[model]}"],
            "authors_undivided": [*paper, "workload.time_compression=1.0"],
            "azure_conversation": ["experiment=e2e_trace", "workload=azure", f"workload.path={azure}", *base],
        }
        for trace, overrides in cases.items():
            for system in SYSTEMS:
                for seed in seeds if system == "nccl_broadcast" and trace.startswith("authors") else seeds[:1]:
                    result = run(compose([*overrides, f"system={system}", f"seed={seed}"]))
                    runs.append(TraceRun(trace, model, system, seed, result))
    return runs


def summary_table(runs: Sequence[TraceRun]) -> pd.DataFrame:
    """One row per run: the headline numbers."""
    return pd.DataFrame([_summary_row(r) for r in runs])


def _summary_row(r: TraceRun) -> dict[str, Any]:
    summary = r.result.summary
    ttft = {f"ttft_{name}_s": summary["ttft_s"][name] for name in ("p50", "p90", "p99")}
    counts = {f"requests_{name}": summary["requests"][name] for name in ("submitted", "completed", "failed")}
    plain = {name: summary[name] for name in ("gpu_seconds", "cost_usd", "scale_outs", "pipeline_first_tokens", "backend")}
    return {"trace": r.trace, "model": r.model, "system": r.system, "seed": r.seed, **ttft, **counts, **plain}


# Reference, section 3 (figures 10 and 11): what λScale gains on the 30-minute trace. Ranges are over models and baselines.
_TTFT_GAIN = "2.4 to 5"
_GPU_LOWER = {"faasnet": 17.8, "nccl_broadcast": 18.1, "serverlessllm_prototype": 31.3, "serverlessllm": 31.3}
_ABOVE_IDEAL = "4.3 to 18.6"


def paper_table(summaries: pd.DataFrame) -> pd.DataFrame:
    """The paper's claims on the 30-minute trace beside ours (simulated), per model; NCCL by the median over its seeds."""
    trace = summaries[summaries.trace == "authors_compressed"]
    columns = ["ttft_p90_s", "gpu_seconds"]
    medians = trace.groupby(["model", "system"])[columns].median()
    rows = []
    for model in PLACES:
        ours = medians.loc[model]
        base = ours.loc["lambdascale"]
        for system, paper_percent in _GPU_LOWER.items():
            gain = ours.loc[system].ttft_p90_s / base.ttft_p90_s
            lower = 100 * (1 - base.gpu_seconds / ours.loc[system].gpu_seconds)
            rows.append(_claim("fig 10", f"P90 TTFT, {system} over λScale", model, _TTFT_GAIN, f"{gain:.2f}"))
            rows.append(_claim("fig 11", f"GPU time lower than {system} by %", model, f"{paper_percent}", f"{lower:.1f}"))
        above = 100 * (base.gpu_seconds / ours.loc["ideal"].gpu_seconds - 1)
        rows.append(_claim("fig 11", "GPU time above ideal by %", model, _ABOVE_IDEAL, f"{above:.1f}"))
    return pd.DataFrame(rows).sort_values(["figure", "what", "model"], kind="stable")


def _claim(figure: str, what: str, model: str, paper: str, ours: str) -> dict[str, str]:
    return {"figure": figure, "what": what, "model": model, "paper": paper, "ours (simulated)": ours}
