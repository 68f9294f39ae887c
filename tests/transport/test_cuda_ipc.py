"""The cuda_ipc transport with a fake driver in host memory; tests/gpu tests it on GPUs."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

import pytest
import torch

from lambdascale.core import CapacityError, UserError
from lambdascale.testing.cuda import FakeCuda
from lambdascale.testing.transports import Heard, Node, TransportConformance
from lambdascale.transport import CudaIpcEndpoint, Endpoint, Handlers, TokenBucket, TransportError, cuda
from lambdascale.transport.cuda import Copies, CudaError, DeviceMemory, Gpu

KEY = b"k" * 32
Make = Callable[..., list[Node]]


class TestCudaIpc(TransportConformance):
    """Peers in one process, which need not open each other's memory."""

    @pytest.fixture(autouse=True)
    def driver(self) -> None:
        self.driver = FakeCuda()

    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        return CudaIpcEndpoint(node, handlers, KEY, gpu=Gpu(0, self.driver))

    def break_off(self, endpoint: Endpoint) -> None:
        assert isinstance(endpoint, CudaIpcEndpoint)
        for connection in list(endpoint._connections.values()):
            connection.sock.shutdown(socket.SHUT_RDWR)

    def test_nothing_is_left(self, nodes: Make) -> None:
        one, two = self.pair(nodes)
        one.endpoint.write(0, self.source(b"x" * 100), 0, 0).result(10)
        for node in (one, two):
            node.endpoint.close()
        assert not self.driver.allocated
        assert not self.driver.opened
        made = sum(name.endswith("Create") for name in self.driver.calls)
        assert made == sum("Destroy" in name for name in self.driver.calls) > 0


class TestForeign(TestCudaIpc):
    """Peers as if in different processes, which open each other's memory; sources on the GPU."""

    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        endpoint = CudaIpcEndpoint(node, handlers, KEY, gpu=Gpu(0, self.driver))
        endpoint.process_id = b"%020d" % node
        return endpoint

    def source(self, data: bytes) -> DeviceMemory:
        memory = Gpu(0, self.driver).allocate(len(data))
        self.keep = (*getattr(self, "keep", ()), memory)
        memory.fill(data)
        return memory

    def test_nothing_is_left(self, nodes: Make) -> None:
        one, two = self.pair(nodes)
        assert sorted(self.driver.opened) == sorted(node.memory.address for node in (one, two))
        one.endpoint.disconnect(0)
        assert not self.driver.opened, "who ends a connection may free its memory: the peer has shut it"
        for node in (one, two):
            node.endpoint.close()
        assert not self.driver.allocated

    def test_a_write_is_told_when_it_is_complete(self, nodes: Make) -> None:
        """A write is reported after its event was waited for; a failed copy is never reported."""
        one, two = self.pair(nodes)
        data = self.source(b"y" * 1000)
        self.driver.calls.clear()
        one.endpoint.write(0, data, 0, 1).result(10)
        two.heard.wait(lambda heard: bool(heard.writes))
        steps = [name for name in self.driver.calls if not name.startswith("cuCtx")]
        assert steps == ["cuEventQuery", "cuMemcpyAsync", "cuEventRecord", "cuEventQuery", "cuEventQuery"]
        self.driver.calls.clear()
        self.driver.failing["cuEventQuery"] = 600  # not ready
        one.endpoint.write(0, data, 0, 1).result(10)
        steps = [name for name in self.driver.calls if name.startswith("cuEvent")]
        assert steps == ["cuEventQuery", "cuEventSynchronize", "cuEventRecord", *["cuEventQuery", "cuEventSynchronize"] * 2]
        two.heard.wait(lambda heard: len(heard.writes) == 2)
        del self.driver.failing["cuEventQuery"]
        self.driver.failing["cuMemcpyAsync"] = 700
        with pytest.raises(TransportError, match=r"node 0: cuMemcpyAsync: status 700 of a fake \(700\)"):
            one.endpoint.write(0, data, 0, 2).result(10)
        one.heard.wait(lambda heard: bool(heard.lost))
        assert [write[1] for write in two.heard.writes] == [1, 1]


class SlowCuda(FakeCuda):
    """Copies are complete when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.failing["cuEventQuery"] = 600  # not ready

    def _cuEventSynchronize(self, event: object) -> None:
        self.inside.set()
        self.go_on.wait(10)


class TestCuts:
    """Connections that break while the driver copies."""

    @staticmethod
    def ends(driver: FakeCuda) -> tuple[Node, Node]:
        """Two connected nodes, each with a driver of its own, ``driver`` that of the first, node 1."""
        two, one = (
            Node(CudaIpcEndpoint(node, heard.handlers(), KEY, gpu=Gpu(0, own)), heard, 1000)
            for node, (heard, own) in enumerate([(Heard(), FakeCuda()), (Heard(), driver)])
        )
        one.endpoint.connect(0, two.endpoint.address)
        return one, two

    def test_a_loss_is_told_when_the_copy_is_complete(self) -> None:
        """The node may use its GPU's memory anew from then on."""
        driver = SlowCuda()
        one, two = self.ends(driver)
        write = one.endpoint.write(0, memoryview(b"x" * 100), 0, 1)
        assert driver.inside.wait(10)
        severing = threading.Thread(target=two.endpoint.sever, args=(1,))
        severing.start()
        severing.join(0.2)
        assert severing.is_alive()
        assert not two.heard.lost
        driver.go_on.set()
        severing.join(10)
        assert two.heard.lost
        with pytest.raises(TransportError):
            write.result(10)
        for node in (one, two):
            node.endpoint.close()

    def test_a_source_is_given_back_when_the_copy_is_complete(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A write that fails between two pieces: the first may still be read."""
        driver = FakeCuda()
        one, two = self.ends(driver)
        assert isinstance(one.endpoint, CudaIpcEndpoint)
        connection = one.endpoint._connections[0]
        monkeypatch.setattr("lambdascale.transport.cuda_ipc._Opened.step_bytes", 100)
        monkeypatch.setattr(connection, "_send_messages", lambda: connection._break("it breaks"))
        write = one.endpoint.write(0, memoryview(b"x" * 1000), 0, 1)
        told = threading.Event()  # a future's waiter may go on before its callbacks are called
        write.add_done_callback(lambda _: (driver.calls.append("done"), told.set()))
        one.heard.wait(lambda heard: bool(heard.lost))
        with pytest.raises(TransportError, match="it breaks"):
            write.result(10)
        assert told.wait(10)
        for node in (one, two):
            node.endpoint.close()
        calls = [
            name
            for name in driver.calls[driver.calls.index("cuMemcpyAsync") : driver.calls.index("done")]
            if not name.startswith("cuCtx")
        ]
        assert calls[:2] == ["cuMemcpyAsync", "cuEventRecord"]
        assert set(calls[2:]) == {"cuEventQuery"}, "asked, however often, until the copy is complete"

    def test_a_peer_whose_file_of_leases_is_not_one(self) -> None:
        """Nobody writes to a node that could not wait for it."""
        driver = FakeCuda()
        one, two = (CudaIpcEndpoint(node, Heard().handlers(), KEY, gpu=Gpu(0, driver)) for node in (1, 0))
        two._leases, before = os.open("/dev/null", os.O_RDWR), two._leases
        with pytest.raises(TransportError, match="is not the memory of a node"):
            one.connect(0, two.address)
        os.close(before)
        for endpoint in (one, two):
            endpoint.close()


class TestPaced(TestCudaIpc):
    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        return CudaIpcEndpoint(node, handlers, KEY, gpu=Gpu(0, self.driver), link=TokenBucket(200e6))


class TestRefusals:
    @pytest.fixture
    def pair(self) -> tuple[CudaIpcEndpoint, CudaIpcEndpoint]:
        self.drivers = FakeCuda(), FakeCuda()
        made = []
        for node, driver in enumerate(self.drivers):
            endpoint = CudaIpcEndpoint(node, Heard().handlers(), KEY, gpu=Gpu(0, driver))
            endpoint.register(endpoint.allocate(1000))
            endpoint.process_id = b"%020d" % node
            made.append(endpoint)
        yield made[1], made[0]
        for endpoint in made:
            endpoint.close()

    def test_another_host(self, pair: tuple[CudaIpcEndpoint, CudaIpcEndpoint]) -> None:
        one, two = pair
        two.host_id = b"elsewhere".ljust(16)
        with pytest.raises(TransportError, match="different hosts"):
            one.connect(0, two.address)
        assert not one._connections
        assert not any(driver.opened for driver in self.drivers)

    @pytest.mark.parametrize("which", [0, 1])
    def test_memory_that_cannot_be_opened(self, pair: tuple[CudaIpcEndpoint, CudaIpcEndpoint], which: int) -> None:
        """The connecting end raises the reason if either end fails to open the other's memory, and leaves nothing open."""
        one, two = pair
        self.drivers[which].failing["cuIpcOpenMemHandle_v2"] = 217
        with pytest.raises(TransportError, match=rf"node {which} \(GPU 0\) cannot open .* of node {1 - which}: .*\(217\)"):
            one.connect(0, two.address)
        assert not self.drivers[1].opened
        assert not one._connections

    def test_other_memory(self, pair: tuple[CudaIpcEndpoint, CudaIpcEndpoint]) -> None:
        for memory in (memoryview(bytearray(1000)), pair[0].gpu.allocate(1000)):
            with pytest.raises(UserError, match="allocate"):
                pair[0].register(memory)


class TestDriver:
    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(name: str) -> object:
            raise OSError(f"{name}: cannot open shared object file")

        monkeypatch.setattr(cuda.ctypes, "CDLL", load)
        cuda.gpu_of.cache_clear()
        with pytest.raises(UserError, match="this machine has no CUDA") as caught:
            cuda.gpu_of(0)
        assert "\n" not in str(caught.value)

    def test_a_driver_without_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        driver = FakeCuda()
        driver.failing["cuInit"] = 100
        for kind in ("CDLL", "PyDLL"):
            monkeypatch.setattr(cuda.ctypes, kind, lambda name: driver)
        cuda.gpu_of.cache_clear()
        with pytest.raises(UserError, match=r"cuInit: .*\(100\)"):
            cuda.gpu_of(0)

    def test_a_gpu_that_is_not_there(self) -> None:
        with pytest.raises(UserError, match="no GPU 2: CUDA finds 2"):
            Gpu(2, FakeCuda(devices=2))

    def test_gpus_are_counted_without_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        driver = FakeCuda(devices=3, capacity=80 << 30)
        monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: driver)
        assert cuda.count_gpus() == 3
        assert cuda.gpu_sizes() == [80 << 30] * 3
        for function in ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceTotalMem_v2"):
            driver.failing = {function: 100}
            assert cuda.count_gpus() == 0

    def test_no_room(self) -> None:
        gpu = Gpu(0, FakeCuda(capacity=4 << 20))
        first = gpu.allocate(1)
        with pytest.raises(CapacityError, match=r"GPU 0 has 0\.00 GB free"):
            gpu.allocate((2 << 20) + 1)
        gpu.free(first)
        gpu.allocate((2 << 20) + 1)

    def test_a_fault_is_no_lack_of_room(self) -> None:
        driver = FakeCuda()
        driver.failing["cuMemAlloc_v2"] = 700
        with pytest.raises(CudaError, match="700"):
            Gpu(0, driver).allocate(1)

    def test_what_returns_at_once_keeps_the_lock(self) -> None:
        """A copy lets other threads run while it waits, and not around calls that return at once."""
        driver, quick = FakeCuda(), FakeCuda()
        gpu = Gpu(0, driver, quick)
        gpu._context.value = 1
        copies = Copies(gpu)
        memory = gpu.allocate(10)
        driver.calls.clear()
        copies.start(memory.address, memory.address, 5)
        assert driver.calls == ["cuMemcpyAsync"]
        quick.failing["cuEventQuery"] = 700
        with pytest.raises(CudaError, match="cuEventQuery"):
            copies.wait()

    def test_the_context_of_the_thread_is_given_back(self) -> None:
        driver = FakeCuda()
        gpu = Gpu(0, driver)
        driver.failing["cuMemcpyAsync"] = 1
        copies = Copies(gpu)
        with pytest.raises(CudaError):
            copies.start(0, 0, 0)
        copies.close()
        assert driver.calls.count("cuCtxPushCurrent_v2") == driver.calls.count("cuCtxPopCurrent_v2") > 0

    def test_pieces_of_memory(self) -> None:
        memory = Gpu(0, FakeCuda()).allocate(10)
        assert bytes(memory) == bytes(10)
        memory[2:5].fill(b"abc")
        assert bytes(memory) == b"\0\0abc" + bytes(5)
        assert (len(memory[2:5]), memory[2:5].address - memory.address) == (3, 2)
        assert bytes(memory[20:30]) == b""
        described = memory[1:5].__cuda_array_interface__
        assert (described["shape"], described["data"]) == ((4,), (memory.address + 1, False))


def test_a_block_on_the_cpu_is_sent_as_before() -> None:
    from lambdascale.live.node.memory import memory_of

    data = torch.arange(10, dtype=torch.uint8)
    found = memory_of(data)
    assert isinstance(found, memoryview)
    assert cuda.address_of(found) == data.data_ptr()
