"""A live cluster whose nodes take turns at the GPUs; blocks land there, or in pinned host memory and go on while it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lambdascale.checkpoints import PackedModel
from lambdascale.core import traced
from lambdascale.core.commands import SwitchMode
from lambdascale.core.events import BlockArrived, ConnectionLost, NodeLost
from tests.live.faults import Break, inject
from tests.live.harness import Watcher, burst, expected, pack_tiny, run, system_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.live,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
REQUESTS = burst(32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_tiny(tmp_path_factory.mktemp("cuda-live"))


@pytest.mark.parametrize(
    ("transport", "kv", "copies"),
    [
        ("shm", "recompute", 1),
        ("shm", "copy", 0),
        ("tcp", "copy", 1),
        ("cuda_ipc", "recompute", 1),
        ("cuda_ipc", "copy", 0),
    ],
)
def test_execute_while_load(tiny: Path, transport: str, kv: str, copies: int) -> None:
    """Tokens of pipelines, across a mode switch and of replicas are those of one node on a CPU (float32, without TF32).

    Without a copy in host memory, the source makes one of what it has on the device, or sends it from there.
    """
    system = system_of("lambdascale", f"system.kv={kv}", f"system.memory.initial_copies={copies}")
    outcome = run(tiny, REQUESTS, system=system, transport=transport, device="cuda")
    assert outcome.answers == expected(PackedModel.open(tiny, "tiny"), REQUESTS)
    assert (outcome.rows.status == "ok").all()
    assert SwitchMode.__name__ in outcome.kinds()
    assert (outcome.rows.first_token_mode == "pipeline").any()


@pytest.mark.parametrize("transport", ["shm", "cuda_ipc"])
def test_load_from_host_memory_and_back(tiny: Path, transport: str) -> None:
    """Released nodes keep host copies and come back from them over PCIe."""
    system = system_of("lambdascale", "system.memory.initial_copies=2", "system.autoscaler.keep_alive_s=0.3")
    again = [traced(r.request_id + 100, 6.0, r.model, r.prompt_tokens, r.output_tokens) for r in REQUESTS]
    requests = [*REQUESTS, *again]
    outcome = run(tiny, requests, system=system, link="2MB/s", transport=transport, device="cuda")
    assert outcome.answers == expected(PackedModel.open(tiny, "tiny"), requests)


@pytest.mark.parametrize("node", [0, 2])
def test_a_killed_node_loses_no_request(tiny: Path, node: int) -> None:
    """The GPU memory of the killed node was open in all the others, and theirs in it."""
    watcher = Watcher(
        lambda entry: isinstance(entry, BlockArrived) and (entry.node, entry.block) == (2, 3),
        lambda backend: backend.launcher.kill(node),
        after_s=0.05,
    )
    outcome = run(tiny, REQUESTS, system=system_of("lambdascale"), transport="cuda_ipc", device="cuda", watchers=[watcher])
    assert watcher.acted
    assert outcome.answers == expected(PackedModel.open(tiny, "tiny"), REQUESTS)
    assert (outcome.rows.status == "ok").all()
    assert any(isinstance(entry, NodeLost) for _, entry in outcome.recorder.entries)


def test_a_broken_connection(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new connection is made once both ends have let go of each other's memory; nobody is given up."""
    inject(Break(node=0, peer=2, after=2), monkeypatch)
    outcome = run(tiny, REQUESTS, system=system_of("lambdascale"), transport="cuda_ipc", device="cuda")
    assert outcome.answers == expected(PackedModel.open(tiny, "tiny"), REQUESTS)
    assert not any(isinstance(entry, NodeLost) for _, entry in outcome.recorder.entries)
    lost = [entry for _, entry in outcome.recorder.entries if isinstance(entry, ConnectionLost)]
    assert {(entry.node, entry.peer) for entry in lost} == {(0, 2)}
