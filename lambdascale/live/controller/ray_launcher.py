"""The ``ray`` launcher: an agent per node, placed by Ray on the machines of a Ray cluster with their GPUs as resources.

Ray places the processes and notices when one ends; their messages go over the same channels as on one host. The
machines are trusted to each other: controller and agents listen on the address that Ray knows them by. The packed model must be
at the same path on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from msgspec import msgpack, structs

from lambdascale.core import NodeId, UserError
from lambdascale.live.controller.launch import End
from lambdascale.live.node.agent import run
from lambdascale.live.node_config import NodeConfig

_JOIN_S = 10.0


def _be_a_node(encoded: bytes) -> None:
    """Run a node in Ray's process."""
    ray = _load_ray()
    config = msgpack.decode(encoded, type=NodeConfig)
    run(structs.replace(config, host=ray.util.get_node_ip_address()), local=False)


def _load_ray() -> Any:
    """Import Ray, most of which has no types; UserError if it is not installed."""
    try:
        return import_module("ray")
    except ImportError as error:
        raise UserError("the ray launcher needs Ray: pip install 'lambdascale[ray]'") from error


class RayLauncher:
    """Agents as Ray tasks in a running cluster (``ray start --head``, or RAY_ADDRESS). UserError without one."""

    def __init__(self, gpus_per_node: float = 0) -> None:
        ray = self._ray = _load_ray()
        self._gpus = gpus_per_node
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                ray.init(address="auto", log_to_driver=True, logging_level="ERROR")
            except ConnectionError as error:
                raise UserError("no Ray cluster is running here: ray start --head, or set RAY_ADDRESS") from error
        self.host: str = ray.util.get_node_ip_address()
        self._tasks: dict[NodeId, Any] = {}

    def start(self, configs: Sequence[NodeConfig]) -> None:
        """See Launcher. UserError if the cluster has too few GPUs."""
        gpus = self._ray.cluster_resources().get("GPU", 0)
        if self._gpus * len(configs) > gpus:
            raise UserError(f"{len(configs)} nodes of {self._gpus:g} GPUs do not fit the Ray cluster's {gpus:g} GPUs")
        task = self._ray.remote(_be_a_node)
        options = task.options(num_cpus=0, num_gpus=self._gpus, max_retries=0, scheduling_strategy="SPREAD")
        for config in configs:
            self._tasks[config.node] = options.remote(msgpack.encode(config))

    def sentinels(self) -> dict[int, NodeId]:
        """See Launcher. None with Ray: deaths are found by asking, and by silence."""
        return {}

    def dead(self) -> dict[NodeId, End]:
        """See Launcher."""
        if not self._tasks:
            return {}
        done, _ = self._ray.wait(list(self._tasks.values()), num_returns=len(self._tasks), timeout=0)
        return {node: End.of(None) for node, task in self._tasks.items() if task in done}

    def kill(self, node: NodeId) -> None:
        """See Launcher."""
        if node in self._tasks:
            self._ray.cancel(self._tasks[node], force=True)

    def close(self) -> None:
        """See Launcher."""
        tasks = list(self._tasks.values())
        if tasks:
            _, left = self._ray.wait(tasks, num_returns=len(tasks), timeout=_JOIN_S)
            for task in left:
                self._ray.cancel(task, force=True)
        self._tasks.clear()
        if self._ours:
            self._ray.shutdown()
