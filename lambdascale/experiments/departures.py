"""Departures of the baselines from the original systems, with their effects, for baselines/*/README.md. Frames in, text out."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from lambdascale.core import UserError

BLOCK = "departures"
_MODELS = {"llama2_7b": "7B", "llama2_13b": "13B"}
#: Folder of a baseline -> its systems -> the departures that the study leaves out one at a time.
DEPARTURES: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "faasnet": {
        "faasnet": {
            "faasnet_no_joins": "new nodes join trees under way while no source is idle (as the original's do)",
            "faasnet_gpu_sources": "host copies feed trees, too; and joins",
            "faasnet_one_tree": "a tree from each source, not one for all",
            "faasnet_own_copies": "new nodes get the model over the network, not from their own host copy where that is faster",
            "faasnet_by_locality": "nodes with a host copy are spared as sources while others are free",
        },
        "faasnet_prototype": {"faasnet_prototype_1s": "a look every 0.5 s, not 1 s"},
    },
    "nccl_broadcast": {
        "nccl_broadcast": {
            "nccl_broadcast_no_own_copies": "new nodes load their own host copy",
            "nccl_broadcast_one_chain": "a chain from each source, not one for all",
        },
        "nccl_prototype": {"nccl_prototype_1s": "a look every 0.5 s, not 1 s"},
    },
    "serverlessllm": {
        "serverlessllm": {
            "serverlessllm_sequential": "the loader reads SSD and PCIe at once (as the original's does)",
            "serverlessllm_by_locality": "nodes are chosen by estimated start-up time (as the original's are)",
        },
        "serverlessllm_prototype": {
            "serverlessllm_prototype_1s": "a look every 0.5 s, not 1 s",
            "serverlessllm_prototype_15s": "host copies kept for ever, not 15 s",
        },
    },
    "ideal": {"ideal_prototype": {"ideal_prototype_1s": "a look every 0.5 s, not 1 s"}},
}


def markdown(table: pd.DataFrame, baseline: str) -> str:
    """P90 TTFT of a baseline, medians over seeds, with everything and without each departure; UserError for missing runs."""
    lines = ["| P90 TTFT [s] (simulated) | " + " | ".join(_MODELS.values()) + " |", "|---|" + "---|" * len(_MODELS)]
    for system, departures in DEPARTURES[baseline].items():
        for name, title in {system: f"`{system}`", **{name: f"without: {text}" for name, text in departures.items()}}.items():
            lines.append("| " + " | ".join([title, *(f"{_p90_s(table, name, model):.3g}" for model in _MODELS)]) + " |")
    return "\n".join(lines) + "\n"


def _p90_s(table: pd.DataFrame, system: str, model: str) -> float:
    rows = table[(table.system == system) & (table.model == model)]
    if rows.empty:
        raise UserError(
            f"no runs of {system}, {model} in the table of departures; scripts/run.py experiment=departures -m makes it"
        )
    return float(rows.ttft_p90_s.median())
