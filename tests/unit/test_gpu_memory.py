"""Memory of GPUs: weights, KV, and what other nodes write beside blocks share it. No processes, no GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hydra.utils import instantiate

from lambdascale.checkpoints.builtin import builtin_model
from lambdascale.control import build_system
from lambdascale.core import CapacityError, Request, TracedRequest
from lambdascale.core.specs import MEMORY_UTILISATION, NodeOverride
from lambdascale.experiments import runner
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.live.config import LiveConfig
from lambdascale.live.serving import server
from lambdascale.live.serving.options import HttpOptions


@pytest.mark.parametrize("kv", ["recompute", "copy"])
@pytest.mark.parametrize("gpu_bytes", [200 << 20, 1 << 30, 80 << 30])
def test_weights_kv_and_what_others_write_fit_a_gpu(gpu_bytes: int, kv: str) -> None:
    """All that the control plane lets a node hold, beside the areas that the node registers, on every kind of GPU."""
    model = builtin_model("tiny", 4)
    composed = compose(["cluster=desk", f"cluster.gpu.memory_bytes={gpu_bytes}", f"system.kv={kv}", "system.blocks=4"])
    cluster, system = instantiate(composed.cluster, _convert_="all"), instantiate(composed.system, _convert_="all")
    cluster = replace(cluster, overrides=(NodeOverride(nodes=(1,), gpu=replace(cluster.gpu, memory_bytes=2 * gpu_bytes)),))
    live, models = LiveConfig(transport="cuda_ipc", device="cuda"), [("m", model)]
    hub: Any = SimpleNamespace(access=None)
    seen = live.seen(cluster, models, system)
    for node in (0, 1):
        areas = live._node(node, hub, cluster, models, system, "gloo").areas
        assert areas.nbytes > 0
        assert (areas.kv_places > 0) == (kv == "copy")
        given = model.spec.size_bytes + seen.node(node).kv_tokens(model.spec) * model.spec.kv_bytes_per_token
        usable = cluster.node(node).gpu.memory_bytes * MEMORY_UTILISATION
        assert usable - model.spec.kv_bytes_per_token < given + areas.nbytes <= usable
    assert seen.node(0).kv_tokens(model.spec) < cluster.node(0).kv_tokens(model.spec)


def test_a_gpu_that_what_others_write_leaves_no_kv() -> None:
    """A run that would exceed the GPU is refused before anything starts."""
    model = builtin_model("tiny", 4)
    composed = compose(["cluster=desk", "system.blocks=4"])
    cluster, system = instantiate(composed.cluster, _convert_="all"), instantiate(composed.system, _convert_="all")
    live, models = LiveConfig(transport="cuda_ipc", device="cuda"), [("m", model)]
    areas = int(live.seen(cluster, models, system).gpu.set_aside_bytes)
    enough = int((model.spec.size_bytes + areas / 2) / MEMORY_UTILISATION)
    cluster = replace(cluster, gpu=replace(cluster.gpu, memory_bytes=enough))
    assert cluster.kv_tokens(model.spec) > 0
    seen = live.seen(cluster, models, system)
    with pytest.raises(CapacityError, match="GB set aside"):
        build_system(system, cluster=seen, models=[model.spec])


@pytest.mark.parametrize("transport", ["shm", "tcp", "rdma"])
def test_host_memory_is_not_taken_from_a_gpu(transport: Any) -> None:
    composed = compose(["cluster=desk", "system.kv=copy", "system.blocks=4"])
    cluster, system = instantiate(composed.cluster, _convert_="all"), instantiate(composed.system, _convert_="all")
    live = LiveConfig(transport=transport, device="cuda")
    assert live.seen(cluster, [("m", builtin_model("tiny", 4))], system).gpu == cluster.gpu


@pytest.mark.parametrize(
    ("transport", "kv", "path"),
    [
        ("shm", "cheapest", "places"),
        ("tcp", "copy", "places"),
        ("rdma", "cheapest", "messages"),
        ("shm", "recompute", "messages"),
    ],
)
def test_the_control_plane_hears_how_kv_moves(transport: Any, kv: str, path: str) -> None:
    """Data of the transport and its places: the control plane knows no backend."""
    composed = compose(["cluster=desk", f"system.kv={kv}", "system.blocks=4"])
    cluster, system = instantiate(composed.cluster, _convert_="all"), instantiate(composed.system, _convert_="all")
    assert cluster.kv_path == "network"
    assert LiveConfig(transport=transport).seen(cluster, [("m", builtin_model("tiny", 4))], system).kv_path == path


def test_a_run_s_control_plane_sees_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set-aside memory counts in the cluster that it decides for and in the limits of answers; nodes hear of the whole GPU."""
    changes = ["cluster=desk", "backend=live", "transport=cuda_ipc", "system.blocks=4", "system.kv=copy"]
    experiment = build(compose([*changes, "backend.device=cuda", "backend.checkpoint=tiny"]))
    assert 0 < int(experiment.seen.gpu.set_aside_bytes) < int(experiment.seen.gpu.memory_bytes)
    given: list[Any] = []

    def refuse(*_: Any, cluster: Any, **__: Any) -> Any:
        given.append(cluster)
        raise InterruptedError

    monkeypatch.setattr(runner, "build_system", refuse)
    with pytest.raises(InterruptedError):
        runner.drive_experiment(experiment, (), 0, cast(Any, None))
    assert given == [experiment.seen]
    assert experiment.cluster.gpu.set_aside_bytes == 0
    (model,) = experiment.models
    longest = TracedRequest(Request(0, 0.0, model.name, 1, 10**9), 10**9)
    (bounded,), _ = runner._bounded(experiment, [longest])
    assert bounded.request.kv_tokens == experiment.seen.kv_tokens(model)


def test_so_does_a_server_s(monkeypatch: pytest.MonkeyPatch) -> None:
    model = builtin_model("tiny", 4)
    composed = compose(["cluster=desk", "system.blocks=4"])
    cluster, system = instantiate(composed.cluster, _convert_="all"), instantiate(composed.system, _convert_="all")
    live, given = LiveConfig(transport="cuda_ipc", device="cuda"), []

    def refuse(*_: Any, cluster: Any, **__: Any) -> Any:
        given.append(cluster)
        raise InterruptedError

    monkeypatch.setattr(server, "build_system", refuse)
    with pytest.raises(InterruptedError):
        server.Service(config=live, model=model, cluster=cluster, system=system, options=HttpOptions(port=0))
    assert given == [live.seen(cluster, [(model.name, model)], system)] != [cluster]
