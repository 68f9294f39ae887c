"""Choice of a cluster's communicator: made once, before its nodes start, and never changed on the way."""

from __future__ import annotations

from typing import Literal

from lambdascale.core import UserError

Kind = Literal["nccl", "gloo"]
Choice = Literal["auto", "nccl", "gloo"]


def choose(wanted: Choice, *, device: str, nodes: int, gpus: int, nccl: bool) -> tuple[Kind, str]:
    """Return the communicator for ``nodes`` nodes with ``gpus`` GPUs in total, and the reason for not using NCCL.

    ``nccl``: true if torch has it. UserError where it is asked for and not possible.
    """
    if device == "cpu":
        why = "it moves the memory of GPUs, and device is cpu"
    elif not nccl:
        why = "this PyTorch build has no NCCL"
    elif gpus < nodes:
        why = f"it refuses two nodes on one GPU, and {nodes} nodes have {gpus}"
    else:
        return ("gloo", "") if wanted == "gloo" else ("nccl", "")
    if wanted == "nccl":
        raise UserError(f"backend.collective=nccl is not possible: {why}")
    return "gloo", "" if wanted == "gloo" or device == "cpu" else why
