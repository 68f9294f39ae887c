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
    _check_minimum(config.autoscaler.min_replicas, cluster, models)
    for model in models:
        cluster.kv_tokens(model)
        model.partition(config.blocks)
    return ControlPlane(config=config, cluster=cluster, models=models)


def _check_minimum(replicas: int, cluster: ClusterSpec, models: Sequence[ModelSpec]) -> None:
    """Raise UserError if the cluster is too small for so many replicas of every model, each on a node of its own."""
    key = "system.autoscaler.min_replicas"
    require(
        replicas <= cluster.nodes,
        f"{key}={replicas} needs as many nodes, cluster {cluster.name} has {cluster.nodes}: a node holds one replica of a model",
    )
    gpus = sum(cluster.node(node).gpus for node in range(cluster.nodes))
    needed = replicas * sum(model.gpus_per_replica for model in models)
    require(
        needed <= gpus,
        f"{key}={replicas} of {len(models)} models needs {needed} GPUs, cluster {cluster.name} has {gpus}; 0 scales to zero",
    )
