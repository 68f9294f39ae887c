"""The composition root: configuration in, objects out."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lambdascale.control import SystemConfig
from lambdascale.control.start import FreeMigration
from lambdascale.core import ClusterSpec, ModelSpec, UserError
from lambdascale.core.checks import shown
from lambdascale.experiments.schema import RunConfig
from lambdascale.experiments.work import check_size
from lambdascale.metrics import Slo
from lambdascale.sim import SimConfig
from lambdascale.workload import RecordedRun, ShapedWorkload

if TYPE_CHECKING:
    from lambdascale.live.config import LiveConfig


@dataclass(frozen=True)
class Experiment:
    """The objects of one run. Building it writes nothing: a live run's built-in model is packed when ``models`` is first read."""

    system: SystemConfig
    configured: tuple[ModelSpec, ...]
    cluster: ClusterSpec
    workload: ShapedWorkload
    backend: SimConfig | LiveConfig
    logger: Any
    slo: Slo | None = None
    token_times: bool = False

    @cached_property
    def models(self) -> tuple[ModelSpec, ...]:
        """Models with the sizes they run with: a live cluster's are those of its checkpoint; UserError if it is cut otherwise."""
        if isinstance(self.backend, SimConfig):
            return self.configured
        return self.backend.specs(self.configured, self.system.blocks)

    @cached_property
    def seen(self) -> ClusterSpec:
        """The cluster as the control plane sees it: live nodes set aside some of their GPUs' memory."""
        if isinstance(self.backend, SimConfig):
            return self.cluster
        packed = self.backend.packed(self.system.blocks)
        return self.backend.seen(self.cluster, [(model.name, packed) for model in self.models], self.system)


def build(config: DictConfig) -> Experiment:
    """Instantiate every group; UserError for values that their classes refuse."""
    _check_keys(config)
    _check_texts(OmegaConf.to_container(config, resolve=True))
    for name in ("model_count", "max_events"):
        if config[name] < 1:
            raise UserError(f"{name} must be at least 1, not {shown(config[name])}")
    system, model, cluster = (
        _instance(config, group, expected)
        for group, expected in (("system", SystemConfig), ("model", ModelSpec), ("cluster", ClusterSpec))
    )
    check_size(cluster, model, system, config.model_count, config.max_events)
    _check_group(config, "logger")
    models = _replicate(model, config.model_count)
    backend = _backend(config, system)
    return Experiment(
        system=system,
        configured=models,
        cluster=cluster,
        workload=_workload(config),
        backend=backend,
        logger=instantiate(config.logger, _convert_="all"),
        slo=_slo(config, tuple(model.name for model in models)),
        # A live cluster transfers hardly anything for them.
        token_times=not isinstance(backend, SimConfig) if config.token_times is None else config.token_times,
    )


def _check_keys(config: DictConfig) -> None:
    """Refuse keys that nothing reads, which Hydra adds to the root when they begin with +."""
    if unread := sorted({str(key) for key in config} - {field.name for field in fields(RunConfig)}):
        raise UserError(f"unknown key {unread[0]}: +KEY=VALUE adds keys to a part of a system or the backend, not to a run")


def _check_texts(value: Any, key: str = "") -> None:
    """Refuse texts with null bytes, wherever they stand: no path may have one."""
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{key} must not contain a null byte, unlike {shown(value)}")
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in entries:
        _check_texts(each, f"{key}.{name}" if key else f"{name}")


def _workload(config: DictConfig) -> ShapedWorkload:
    if config.replay is not None:
        return RecordedRun(path=config.replay)
    workload = _instance(config, "workload", ShapedWorkload)
    assert isinstance(workload, ShapedWorkload), "checked when it was made"
    return workload


def _slo(config: DictConfig, models: tuple[str, ...]) -> Slo | None:
    setting: Any = OmegaConf.to_container(config.slo) if OmegaConf.is_config(config.slo) else config.slo
    return None if setting is None else Slo.parse(setting, models)


def _backend(config: DictConfig, system: SystemConfig) -> SimConfig | LiveConfig:
    _check_group(config, "backend")
    simulated = config.backend.get("_target_") == "lambdascale.sim.SimConfig"
    if simulated and "transport" in config.backend:
        raise UserError(
            f"transport={config.backend.transport} is how a live cluster moves bytes, it needs backend=live; "
            "the simulated network is that of cluster="
        )
    backend = instantiate(config.backend, _convert_="all")
    if isinstance(backend, SimConfig):
        return backend
    # torch takes seconds to import: for live runs only.
    from lambdascale.live.config import LiveConfig

    if not isinstance(backend, LiveConfig):
        raise UserError(f"backend must configure a SimConfig or a LiveConfig, not a {type(backend).__name__}")
    if isinstance(system.start, FreeMigration):
        raise UserError(f"system={system.name} has system.start FreeMigration, a bound that is simulated only")
    # Start policies without a multicast have no such setting.
    barrier_s = getattr(system.start, "barrier_s", None)
    if barrier_s is not None:
        raise UserError(
            f"system={system.name} has system.start.barrier_s={barrier_s:g}, which is simulated only: a live cluster's sends do "
            "not wait for rounds; choose another system, or system.start.barrier_s=null"
        )
    return backend


def _replicate(model: ModelSpec, count: int) -> tuple[ModelSpec, ...]:
    if count == 1:
        return (model,)
    return tuple(replace(model, name=f"{model.name}-{index:02d}") for index in range(count))


def _check_group(config: DictConfig, group: str) -> None:
    if not isinstance(config[group], DictConfig) or not isinstance(config[group].get("_target_"), str):
        raise UserError(f"{group} must be a configuration with a _target_, not {shown(config[group])}")


def _instance(config: DictConfig, group: str, expected: type[Any]) -> Any:
    _check_group(config, group)
    built = instantiate(config[group], _convert_="all")
    if not isinstance(built, expected):
        raise UserError(f"{group} must configure a {expected.__name__}, not a {type(built).__name__}")
    return built
