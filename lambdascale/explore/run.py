"""One scenario, driven to its end or to the first invariant that does not hold."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

from lambdascale.control import Observer, build_system, drive
from lambdascale.explore.cluster import FaultyCluster
from lambdascale.explore.invariants import Watched
from lambdascale.explore.scenario import Scenario
from lambdascale.testing.invariants import Named


@dataclass(frozen=True)
class Outcome:
    """``broken``: the name of the invariant that does not hold, "" if all do; ``case``: how it shows. ``events``: number told."""

    broken: str
    case: str
    events: int


def run(
    scenario: Scenario,
    *,
    observers: tuple[Observer, ...] = (),
    struck: Callable[[float, str], None] = lambda at, what: None,
) -> Outcome:
    """Drive a scenario. ``observers`` watch it; ``struck`` is called with time and description of every fault."""
    cluster = FaultyCluster(scenario, struck)
    plane = build_system(scenario.system, cluster=scenario.cluster, models=scenario.models)
    watched = Watched(plane, cluster, scenario)
    try:
        drive(watched, cluster, observers)
        watched.finish()
    except AssertionError as error:
        named = error.args[0] if error.args else ""
        if isinstance(named, Named):
            return Outcome(named.name, str(named), watched.events)
        return Outcome("no crash", _where(error), watched.events)
    except Exception as error:  # whatever it is, the control plane has raised it
        return Outcome("no crash", _where(error), watched.events)
    return Outcome("", "", watched.events)


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename.rpartition('/')[2]}:{frame.lineno} in {frame.name})"
