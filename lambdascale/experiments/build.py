"""The composition root: configuration in, objects out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from lambdascale.control import SystemConfig
from lambdascale.core import ClusterSpec, ModelSpec, UserError
from lambdascale.sim import SimConfig
from lambdascale.workload import ShapedWorkload


@dataclass(frozen=True)
class Experiment:
    """The objects of one run."""

    system: SystemConfig
    models: tuple[ModelSpec, ...]
    cluster: ClusterSpec
    workload: ShapedWorkload
    backend: SimConfig
    logger: Any


def build(config: DictConfig) -> Experiment:
    """Instantiate every group; UserError for values their classes refuse."""
    if config.model_count < 1:
        raise UserError(f"model_count must be at least 1, not {config.model_count}")
    model = _instance(config, "model", ModelSpec)
    return Experiment(
        system=_instance(config, "system", SystemConfig),
        models=_replicate(model, config.model_count),
        cluster=_instance(config, "cluster", ClusterSpec),
        workload=_instance(config, "workload", ShapedWorkload),
        backend=_instance(config, "backend", SimConfig),
        logger=instantiate(config.logger, _convert_="all"),
    )


def _replicate(model: ModelSpec, count: int) -> tuple[ModelSpec, ...]:
    if count == 1:
        return (model,)
    return tuple(replace(model, name=f"{model.name}-{index:02d}") for index in range(count))


def _instance(config: DictConfig, group: str, expected: type[Any]) -> Any:
    built = instantiate(config[group], _convert_="all")
    if not isinstance(built, expected):
        raise UserError(f"{group} must configure a {expected.__name__}, not a {type(built).__name__}")
    return built
