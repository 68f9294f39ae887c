"""Set-ups of communicators in simulated runs: how many ranks they had, and whether set-ups for so many were measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lambdascale.metrics import Recorder
from lambdascale.metrics.starts import largest_broadcast
from lambdascale.sim import SimConfig
from lambdascale.sim.communicator import setup_basis


def simulated_setup(backend: object, recorder: Recorder) -> dict[str, Any] | None:
    """Ranks of the largest communicator whose set-up was drawn, and the basis of the draw; None in a run without any."""
    ranks = largest_broadcast(recorder)
    if not isinstance(backend, SimConfig) or not backend.transfers.draws_setups or not ranks:
        return None
    return {"ranks": ranks, "basis": setup_basis(ranks)}


def setup_text(summaries: Iterable[Mapping[str, Any]]) -> str:
    """Ranks of the largest communicator of some runs and the basis of its set-up; empty without any or if it was measured."""
    found = [summary["communicator_setup"] for summary in summaries if summary["communicator_setup"] is not None]
    largest = max(found, key=lambda setup: setup["ranks"], default={"basis": "measured"})
    return "" if largest["basis"] == "measured" else f"up to {largest['ranks']} ranks: {largest['basis']}"
