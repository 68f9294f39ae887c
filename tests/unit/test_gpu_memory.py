"""Memory of GPUs: weights, KV, and what other nodes write beside blocks share it. No processes, no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hydra.utils import instantiate

from lambdascale.checkpoints.builtin import builtin_model
from lambdascale.checkpoints.safetensors_file import ALIGNMENT
from lambdascale.control import build_system, drive
from lambdascale.core import CapacityError, ModelSpec, Request, TracedRequest, traced
from lambdascale.core.commands import Serve
from lambdascale.core.specs import MEMORY_UTILISATION, NodeOverride
from lambdascale.experiments import runner
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.inference.arena import Extents
from lambdascale.live import config as live_config
from lambdascale.live.config import LiveConfig
from lambdascale.live.serving import server
from lambdascale.live.serving.options import HttpOptions
from lambdascale.metrics import Recorder, requests_table
from lambdascale.sim import SimConfig


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
        told = live._node(node, hub, cluster, models, system, "gloo")
        assert told.areas.nbytes > 0
        assert (told.areas.kv_places > 0) == (kv == "copy")
        given = told.device_bytes + seen.node(node).kv_tokens(model.spec) * model.spec.kv_bytes_per_token
        usable = cluster.node(node).gpu.memory_bytes * MEMORY_UTILISATION
        assert usable - model.spec.kv_bytes_per_token < given + told.areas.nbytes <= usable
    assert seen.node(0).kv_tokens(model.spec) < cluster.node(0).kv_tokens(model.spec)


def desk(*overrides: str) -> tuple[Any, Any]:
    """The cluster and the system of a configuration."""
    composed = compose(["cluster=desk", "system.blocks=4", *overrides])
    return instantiate(composed.cluster, _convert_="all"), instantiate(composed.system, _convert_="all")


def packed(name: str, mb: int) -> tuple[str, Any]:
    """A stand-in for a packed model of four blocks, a little larger than they are in whole pages."""
    spec = ModelSpec(name=name, layers=8, hidden=64, heads=4, kv_heads=4, vocab=100, weight_bytes=(mb << 20) + 12)
    block_bytes = tuple(block.size_bytes for block in spec.partition(4))
    architecture = SimpleNamespace(layers=8, max_position=4096)
    model = SimpleNamespace(spec=spec, block_bytes=block_bytes, blocks=block_bytes, architecture=architecture)
    model.row_bytes, model.directory = 128, Path(".")
    return name, model


def fits_exactly(live: LiveConfig, models: list[tuple[str, Any]], *overrides: str, sharing: int = 1) -> None:
    """Models that are served at once get all that a node's GPU has room for, and no more."""
    cluster, system = desk(*overrides)
    hub: Any = SimpleNamespace(access=None)
    node, seen = live._node(0, hub, cluster, models, system, "gloo"), live.seen(cluster, models, system).node(0)
    taken = node.device_bytes + (node.areas.nbytes if live.transport == "cuda_ipc" else 0)
    usable = int(cluster.gpu.memory_bytes) * MEMORY_UTILISATION / sharing
    gpus = cluster.gpus_per_node
    for _, model in models:
        per_token = model.spec.kv_bytes_per_token
        kv = seen.kv_tokens(model.spec) * per_token
        assert 0 < gpus * kv <= usable - taken < gpus * (kv + per_token + 2)


@pytest.mark.parametrize("system", ["lambdascale", "ideal"])
@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("sizes", [(40,), (40, 40), (40, 40, 40, 40), (60, 10, 30, 5)])
@pytest.mark.parametrize("transport", ["shm", "cuda_ipc"])
def test_weights_of_all_models_and_kv_fit_a_gpu(transport: Any, sizes: tuple[int, ...], gpus: int, system: str) -> None:
    """A node's memory for weights holds more than the model that is served: what is left is all that KV may take."""
    models = [packed(f"m{index}", size) for index, size in enumerate(sizes)]
    live = LiveConfig(transport=transport, device="cuda")
    fits_exactly(live, models, f"system={system}", f"cluster.gpus_per_node={gpus}", "cluster.gpu.memory_bytes=600MB")


def test_a_node_that_counts_for_more_gpus_than_others() -> None:
    """Node 1 serves two models at once: it keeps room for the weights of three, and each has half of what is left for KV."""
    models = [packed(name, 40) for name in "abcd"]
    cluster, system = desk("cluster.gpu.memory_bytes=600MB")
    seen = LiveConfig(device="cuda").seen(replace(cluster, overrides=(NodeOverride(nodes=(1,), gpus=2),)), models, system)
    spec = models[0][1].spec
    for node, weights, parts in ((0, 2, 1), (1, 3, 2)):
        kv = seen.node(node).kv_tokens(spec) * spec.kv_bytes_per_token
        assert 0 <= (540e6 - weights * (40 << 20)) / parts - kv < spec.kv_bytes_per_token + weights * 4 * ALIGNMENT


@pytest.mark.parametrize(("gpus", "sharing"), [(0, 1), (1, 4), (2, 2), (3, 2), (4, 1), (8, 1)])
def test_nodes_that_share_a_gpu_share_its_memory(gpus: int, sharing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four nodes take turns at as many GPUs. Ray gives each its own."""
    monkeypatch.setattr(live_config, "count_gpus", lambda: gpus)
    models = [packed("a", 40), packed("b", 30)]
    fits_exactly(LiveConfig(device="cuda"), models, "cluster.gpu.memory_bytes=600MB", sharing=sharing)
    fits_exactly(LiveConfig(device="cuda", launcher="ray"), models, "cluster.gpu.memory_bytes=600MB")


def test_a_second_model_s_weights_leave_no_kv() -> None:
    """A GPU with room for a model and its KV, but not for the weights of two, is refused before anything starts."""
    models = [packed("a", 40), packed("b", 40)]
    cluster, system = desk("cluster.gpu.memory_bytes=84MiB")
    specs, live = [model.spec for _, model in models], LiveConfig(device="cuda")
    build_system(system, cluster=live.seen(cluster, models[:1], system), models=specs[:1])
    with pytest.raises(CapacityError, match=r"0\.08 GB for weights of all models"):
        build_system(system, cluster=live.seen(cluster, models, system), models=specs)


@pytest.mark.parametrize(("tokens", "status"), [(20_000, "ok"), (20_001, "failed")])
def test_a_simulation_of_the_same_cluster_promises_as_much(tokens: int, status: str) -> None:
    """Two models of 40 MiB, in whole pages, on a GPU with room for them and 20,000 tokens, which a request may need alone."""
    models = [packed("a", 40), packed("b", 40)]
    live = LiveConfig(device="cuda")
    per_token, arena = models[0][1].spec.kv_bytes_per_token, live.memory(models, desk()[1], 4).weights_bytes(1)
    assert 80 << 20 < arena <= (80 << 20) + 8 * ALIGNMENT
    cluster, system = desk(f"cluster.gpu.memory_bytes={round((arena + 20_000.5 * per_token) / 0.9)}")
    seen, specs, recorder = live.seen(cluster, models, system), [model.spec for _, model in models], Recorder()
    requests = [traced(number, 0.1, name, tokens - 10, 5, 10) for number, name in enumerate("ab")]
    backend = SimConfig().build(cluster=seen, models=specs, requests=requests, batching=system.batching, seed=0)
    drive(build_system(system, cluster=seen, models=specs), backend, [recorder])
    served = [entry for _, entry in recorder.entries if isinstance(entry, Serve)]
    assert {(each.model, each.kv_tokens) for each in served} == {("a", 20_000), ("b", 20_000)}
    assert [row["status"] for row in requests_table(recorder, "system").to_pylist()] == [status, status]


def test_kv_in_host_memory_is_not_taken_from_a_gpu() -> None:
    cluster, system = desk()
    assert LiveConfig().seen(cluster, [packed("a", 40), packed("b", 40)], system).gpu == cluster.gpu


@pytest.mark.parametrize("models", [1, 2])
def test_slots_that_a_gpu_has_no_room_for_are_refused(models: int) -> None:
    """A replica's KV is reserved when it starts, for the longest sequences: every start would fail."""
    named = [packed(name, 40) for name in "ab"[:models]]
    live = LiveConfig(device="cuda", slot_tokens=512)
    needed = 8 * 512 * named[0][1].spec.kv_bytes_per_token
    arena = models * (40 << 20) + (2 << 14)
    for more, fits in ((-(1 << 16), False), (1 << 16, True)):
        cluster, system = desk(f"cluster.gpu.memory_bytes={round((arena + needed + more) / 0.9)}")
        if fits:
            live.check_slots(cluster, named, system)
            continue
        with pytest.raises(CapacityError, match=r"8 slots of 512 tokens .* of a: .*backend\.slot_tokens"):
            live.check_slots(cluster, named, system)
        with pytest.raises(CapacityError, match="slots of 512 tokens"):
            live.start(cluster=cluster, models=named, system=system)
        replace(live, executor="timed").check_slots(cluster, named, system)
        replace(live, device="cpu").check_slots(cluster, named, system)


@pytest.mark.parametrize("room", ["0", "80MiB"])
def test_a_model_lands_in_host_memory_while_another_leaves_it(room: str) -> None:
    """Blocks that others send to a GPU's node stay in its host memory until their model is released, as the next one comes."""
    models = [packed(f"m{index}", 40) for index in range(4)]
    enabled = str(room != "0").lower()
    cluster, system = desk(f"system.memory.enabled={enabled}", f"system.memory.budget={room}")
    hub: Any = SimpleNamespace(access=None)
    node = LiveConfig(device="cuda")._node(0, hub, cluster, models, system, "gloo")
    extents = Extents(node.host_bytes // ALIGNMENT * ALIGNMENT)
    kept = system.memory.room_bytes(int(cluster.host_memory_bytes)) // models[0][1].spec.size_bytes
    for _, model in models[: kept + 2]:
        assert all(extents.take(size) is not None for size in model.block_bytes)


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
    gpu = live.seen(cluster, [("m", builtin_model("tiny", 4))], system).gpu
    assert replace(gpu, weights_bytes=None) == cluster.gpu


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
