"""The root of the configuration, typed: misspelt keys and wrong types fail at composition.

The groups are left open here; what they instantiate are frozen dataclasses that check themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from lambdascale.experiments.work import MAX_EVENTS


@dataclass
class RunConfig:
    """One run. Unfrozen, since Hydra merges into it."""

    system: Any = MISSING
    model: Any = MISSING
    cluster: Any = MISSING
    workload: Any = MISSING
    backend: Any = MISSING
    logger: Any = MISSING
    name: str = MISSING
    tags: list[str] = field(default_factory=list)
    objective: str | None = None
    model_count: int = 1
    seed: int = 1
    max_events: int = MAX_EVENTS
    slo: Any = None
    token_times: bool | None = None
    replay: str | None = None
    out: str | None = None
    force: bool = False
    results: str = "results"
    traces: str = "data/traces"
    study: Any = None


def register_schema() -> None:
    """Make the schema known to Hydra under the name conf/run.yaml refers to."""
    ConfigStore.instance().store(name="schema", node=RunConfig)
