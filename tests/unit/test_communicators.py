"""Choice of communicators, and broadcasts that are given up."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from lambdascale.control import SystemConfig
from lambdascale.core import UserError
from lambdascale.experiments.compose import compose
from lambdascale.live import config
from lambdascale.live.config import LiveConfig
from lambdascale.live.node import communicators
from lambdascale.live.node.communicators import Nccl, choose


@pytest.mark.parametrize(
    ("wanted", "device", "gpus", "nccl", "kind", "why"),
    [
        ("auto", "cuda", 4, True, "nccl", ""),
        ("auto", "cuda", 8, True, "nccl", ""),
        ("nccl", "cuda", 4, True, "nccl", ""),
        ("gloo", "cuda", 4, True, "gloo", ""),
        ("auto", "cuda", 2, True, "gloo", "it refuses two nodes on one GPU, and 4 nodes have 2"),
        ("auto", "cuda", 4, False, "gloo", "this PyTorch build has no NCCL"),
        ("gloo", "cuda", 2, True, "gloo", ""),
        ("auto", "cpu", 0, False, "gloo", ""),
        ("auto", "cpu", 4, True, "gloo", ""),
    ],
)
def test_choice(wanted: Any, device: str, gpus: int, nccl: bool, kind: str, why: str) -> None:
    assert choose(wanted, device=device, nodes=4, gpus=gpus, nccl=nccl) == (kind, why)


@pytest.mark.parametrize(
    ("device", "gpus", "nccl", "says"),
    [
        ("cuda", 3, True, "4 nodes have 3"),
        ("cuda", 4, False, "this PyTorch build has no NCCL"),
        ("cpu", 4, True, "device is cpu"),
    ],
)
def test_what_cannot_be_is_an_error(device: str, gpus: int, nccl: bool, says: str) -> None:
    with pytest.raises(UserError, match=says):
        choose("nccl", device=device, nodes=4, gpus=gpus, nccl=nccl)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(config, "has_nccl", lambda: True)


def system(name: str) -> SystemConfig:
    built = instantiate(compose([f"system={name}"]).system, _convert_="all")
    assert isinstance(built, SystemConfig)
    return built


@pytest.mark.usefixtures("two_gpus")
def test_of_a_cluster() -> None:
    live = LiveConfig(device="cuda")
    nccl, ours = system("nccl_broadcast"), system("lambdascale")
    assert live.communicator(nccl, 2) == ("nccl", "")
    assert live.communicator(nccl, 3)[0] == "gloo"
    assert live.communicator(ours, 2) == (None, "")
    assert replace(live, launcher="ray").communicator(nccl, 3) == ("nccl", ""), "Ray gives every node a GPU"
    assert replace(live, device="cpu").communicator(nccl, 2) == ("gloo", "")
    asked = replace(live, collective="nccl")
    assert asked.communicator(ours, 3) == (None, ""), "a system without broadcasts does not need it"
    with pytest.raises(UserError, match="3 nodes have 2"):
        asked.communicator(nccl, 3)
    with pytest.raises(UserError, match="needs device cuda, not cpu"):
        LiveConfig(collective="nccl")


class Never:
    """An event that never comes."""

    def query(self) -> bool:
        return False


def waiting(lost: str = "") -> Nccl:
    made = Nccl.__new__(Nccl)
    made._lost = lambda: lost
    return made


def test_a_lost_member_ends_the_wait_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="node 2 is lost"):
        waiting("node 2 is lost")._until(Never())
    assert time.monotonic() - began < communicators.TIMEOUT_S / 4


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communicators, "TIMEOUT_S", 0.05)
    with pytest.raises(RuntimeError, match="has not moved"):
        waiting()._until(Never())


@pytest.mark.parametrize(("error", "called"), [(None, ["shutdown"]), (RuntimeError("broken"), ["abort"])])
def test_a_broken_communicator_is_aborted(error: RuntimeError | None, called: list[str]) -> None:
    """A shutdown would wait for kernels that never end."""
    seen: list[str] = []
    made = waiting()
    made._group = SimpleNamespace(shutdown=lambda: seen.append("shutdown"), abort=lambda: seen.append("abort"))
    with suppress(RuntimeError), made:
        if error is not None:
            raise error
    assert seen == called
