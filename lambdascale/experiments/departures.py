"""Departures of the systems from the originals, with their effects, for baselines/*/README.md and docs/paper.md. Frames in, text
out.

A departure is left out, or the original's part is put in; where that part would be a system of its own, it costs nothing: a
bound of what it can give, from one side, the system without it being the bound from the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from lambdascale.core import UserError

BLOCK = "departures"
_MODELS = {"llama2_7b": "7B", "llama2_13b": "13B"}
#: Key of λScale's own prototype, whose departures stand in docs/paper.md.
OURS = "lambdascale"
#: Folder of a baseline -> its systems -> the runs that the study compares with each, and what they are.
DEPARTURES: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "faasnet": {
        "faasnet": {
            "faasnet_no_joins": "without: new nodes join trees under way while no source is idle (as the original's do)",
            "faasnet_gpu_sources": "without: host copies feed trees, too; and joins",
            "faasnet_one_tree": "without: a tree from each source, not one for all",
            "faasnet_own_copies": "without: new nodes get the model over the network, not from host copies where that is faster",
            "faasnet_by_locality": "without: nodes with a host copy are spared as sources while others are free",
            "faasnet_standing_tree": "instead: one tree over the model's life, rebalanced after every join and leave at no cost",
            "faasnet_any_tree": "bound: the best of all trees, every new node has a source of its own at 42 GB/s",
        },
        "faasnet_prototype": {"faasnet_prototype_1s": "without: a look every 0.5 s, not 1 s"},
    },
    "nccl_broadcast": {
        "nccl_broadcast": {
            "nccl_broadcast_no_own_copies": "without: new nodes load their own host copy",
            "nccl_broadcast_one_chain": "without: a chain from each source, not one for all",
            "nccl_broadcast_free_root": "without: a root's GPU is occupied by its broadcast",
        },
        "nccl_prototype": {
            "nccl_prototype_1s": "without: a look every 0.5 s, not 1 s",
            "nccl_prototype_free_root": "without: a root's GPU is occupied by its broadcast",
            "nccl_prototype_sleeps": "instead: broadcasts are sleeps of 0.45 to 0.97 s, as in the prototype's script",
        },
    },
    "serverlessllm": {
        "serverlessllm": {
            "serverlessllm_sequential": "without: the loader reads SSD and PCIe at once (as the original's does)",
            "serverlessllm_by_locality": "without: nodes are chosen by estimated start-up time (as the original's are)",
            "serverlessllm_migration": "bound: requests of other models leave nodes with a copy, at no cost",
        },
        "serverlessllm_12_models": {
            "serverlessllm_12_models_migration": "bound: requests of other models leave nodes with a copy, at no cost",
        },
        "serverlessllm_prototype": {
            "serverlessllm_prototype_1s": "without: a look every 0.5 s, not 1 s",
            "serverlessllm_prototype_15s": "without: host copies kept for ever, not 15 s",
        },
    },
    "ideal": {"ideal_prototype": {"ideal_prototype_1s": "without: a look every 0.5 s, not 1 s"}},
    OURS: {
        "lambdascale_prototype": {
            "lambdascale_prototype_single_blocks": "without: stages are made of pairs of blocks",
            "lambdascale_prototype_lock_step": "bound: a controller steps pipelines, 6 ms for each stage as for its rounds",
            "lambdascale_prototype_predicted": "without: pipelines of fixed lengths; `lambdascale`'s in their place",
        }
    },
}
_TITLES = {"serverlessllm_12_models": "`serverlessllm`, 12 models drawn for the same arrivals"}


def markdown(table: pd.DataFrame, baseline: str) -> str:
    """P90 TTFT of a baseline, medians over seeds, as it is and in each run beside it; UserError for missing runs."""
    lines = ["| P90 TTFT [s] (simulated) | " + " | ".join(_MODELS.values()) + " |", "|---|" + "---|" * len(_MODELS)]
    for system, departures in DEPARTURES[baseline].items():
        for name, title in {system: _TITLES.get(system, f"`{system}`"), **departures}.items():
            lines.append("| " + " | ".join([title, *(f"{_p90_s(table, name, model):.3g}" for model in _MODELS)]) + " |")
    return "\n".join(lines) + "\n"


def _p90_s(table: pd.DataFrame, system: str, model: str) -> float:
    rows = table[(table.system == system) & (table.model == model)]
    if rows.empty:
        raise UserError(
            f"no runs of {system}, {model} in the table of departures; scripts/run.py experiment=departures -m makes it"
        )
    return float(rows.ttft_p90_s.median())
