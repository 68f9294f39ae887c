"""GPU memory registered with NICs, with fake verbs and a fake driver, since the hardware was not available."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lambdascale.core import UserError
from lambdascale.live.config import LiveConfig
from lambdascale.testing.cuda import FakeCuda
from lambdascale.transport.cuda import DeviceMemory, Gpu
from lambdascale.transport.rdma import RdmaOptions

VERBS = ("enums", "device", "mr", "pd", "pyverbs_error")
OURS = "lambdascale.transport.rdma"


class PyverbsError(Exception):
    pass


class Registration:
    """A memory region, registered by its address or as a dma-buf."""

    refused = ""

    def __init__(self, domain: str, length: int, access: int, address: int | None = None, dmabuf: int | None = None) -> None:
        if self.refused:
            raise PyverbsError(self.refused)
        self.domain, self.length, self.access, self.address = domain, length, access, address
        self.descriptor = None if dmabuf is None else os.readlink(f"/proc/self/fd/{dmabuf}")
        self.lkey, self.rkey, self.closed = 1, 2, False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def gpudirect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, imported with fake verbs, which are removed afterwards."""
    for part in ("device", "gpudirect"):
        monkeypatch.delitem(sys.modules, f"{OURS}.{part}", raising=False)
    package: Any = ModuleType("pyverbs")
    monkeypatch.setitem(sys.modules, "pyverbs", package)
    for name in VERBS:
        module: Any = ModuleType(f"pyverbs.{name}")
        monkeypatch.setitem(sys.modules, f"pyverbs.{name}", module)
        setattr(package, name, module)
    flags = {"IBV_ACCESS_LOCAL_WRITE": 1, "IBV_ACCESS_REMOTE_WRITE": 2, "IBV_ACCESS_MW_BIND": 16}
    kinds = {"IBV_GID_TYPE_IB": 0, "IBV_GID_TYPE_ROCE_V1": 1, "IBV_GID_TYPE_ROCE_V2": 2}
    vars(package.enums).update(flags | kinds)
    vars(package.device).update(Context=object, get_device_list=list)
    vars(package.mr).update(MR=Registration, DmaBufMR=Registration)
    vars(package.pd).update(PD=object)
    vars(package.pyverbs_error).update(PyverbsError=PyverbsError)
    yield importlib.import_module(f"{OURS}.gpudirect")
    for part in ("device", "gpudirect"):
        sys.modules.pop(f"{OURS}.{part}", None)
        vars(sys.modules[OURS]).pop(part, None)


@pytest.fixture
def driver() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def memory(driver: FakeCuda) -> DeviceMemory:
    return Gpu(0, driver).allocate(5_000_001)


NICS = (SimpleNamespace(domain="a"), SimpleNamespace(domain="b"))


def exported() -> int:
    """Open descriptors of dma-bufs; other descriptors are ignored, since threads of earlier tests may still close some."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found += "dma-buf" in str(descriptor.readlink())
    return found


def test_by_dma_buf(gpudirect: Any, memory: DeviceMemory, driver: FakeCuda) -> None:
    """Every rail registers the exported memory from address 0, and the descriptor is closed afterwards."""
    region = gpudirect.register(NICS, memory, "dmabuf", remote=True, windows=False)
    assert [(mr.domain, mr.length, mr.access, mr.address) for mr in map(region.of, (0, 1))] == [
        ("a", 5_000_001, 3, None),
        ("b", 5_000_001, 3, None),
    ]
    assert all("dma-buf" in region.of(rail).descriptor for rail in (0, 1))
    assert exported() == 0
    assert driver.calls.count("cuMemGetHandleForAddressRange") == 1
    assert "cuPointerSetAttribute" in driver.calls
    assert region.has(memory.address + 5, 10)
    assert not region.has(memory.address + 5_000_000, 2)
    assert (region.origin, region.place(memory.address + 77)) == (0, 77)


def test_by_peermem(gpudirect: Any, memory: DeviceMemory, driver: FakeCuda) -> None:
    """NICs use the GPU's addresses."""
    region = gpudirect.register(NICS, memory, "peermem", remote=False, windows=True)
    assert [(mr.access, mr.address, mr.descriptor) for mr in map(region.of, (0, 1))] == [(17, memory.address, None)] * 2
    assert (region.origin, region.place(memory.address + 77)) == (memory.address, memory.address + 77)
    assert "cuMemGetHandleForAddressRange" not in driver.calls


@pytest.mark.parametrize(("way", "advice"), [("dmabuf", "open kernel modules"), ("peermem", "modprobe nvidia_peermem")])
def test_verbs_that_refuse(gpudirect: Any, memory: DeviceMemory, way: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one line with advice, and no other way of registration is tried."""
    monkeypatch.setattr(Registration, "refused", "Failed to register a MR. Errno: 14, Bad address")
    with pytest.raises(UserError, match=f"gpudirect={way} does not work here: .*{advice}.*Bad address") as caught:
        gpudirect.register(NICS, memory, way, remote=True, windows=False)
    assert "\n" not in str(caught.value)
    assert "ulimit" not in str(caught.value)
    assert exported() == 0


def test_a_driver_that_exports_nothing(
    gpudirect: Any, memory: DeviceMemory, driver: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeCuda, "_cuDeviceGetAttribute", lambda self, value, attribute, device: None)
    with pytest.raises(UserError, match="the driver of GPU 0 exports none"):
        gpudirect.register(NICS, memory, "dmabuf", remote=True, windows=False)
    monkeypatch.undo()
    driver.failing["cuMemGetHandleForAddressRange"] = 801
    with pytest.raises(UserError, match="801"):
        gpudirect.register(NICS, memory, "dmabuf", remote=True, windows=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"transport": "rdma"}, "not rdma and cpu"),
        ({"transport": "shm", "device": "cuda"}, "not shm and cuda"),
    ],
)
def test_where_it_makes_no_sense(settings: dict[str, Any], says: str) -> None:
    options = RdmaOptions(gpudirect="dmabuf")
    with pytest.raises(UserError, match=says):
        LiveConfig(rdma=options, **settings)
    assert LiveConfig(transport="rdma", device="cuda", rdma=options).rdma.gpudirect == "dmabuf"


def test_a_way_that_is_none() -> None:
    with pytest.raises(UserError, match="gpudirect"):
        RdmaOptions(gpudirect="magic")
