"""Assembly of a control plane from its configuration."""

from __future__ import annotations

from collections.abc import Sequence

from lambdascale.control.plane import ControlPlane
from lambdascale.control.system import SystemConfig
from lambdascale.core import ClusterSpec, ModelSpec
from lambdascale.core.checks import require


def build_system(config: SystemConfig, *, cluster: ClusterSpec, models: Sequence[ModelSpec]) -> ControlPlane:
    """Return the system for this cluster and these models; CapacityError or UserError when they do not fit each other."""
    require(bool(models), "a run needs at least one model")
    names = [model.name for model in models]
    require(len(set(names)) == len(names), f"model names must differ, got {names}")
    require(
        config.start.storage != "remote" or float(cluster.remote_bytes_per_s) > 0,
        f"system.start.storage=remote needs a remote store: cluster {cluster.name} has remote_bytes_per_s=0",
    )
    for model in models:
        cluster.kv_tokens(model)
        model.partition(config.blocks)
    return ControlPlane(config=config, cluster=cluster, models=models)
