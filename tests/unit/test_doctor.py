"""``lambdascale doctor``: results of each check on fake machines, and a disk measurement that leaves no file behind."""

from __future__ import annotations

import argparse
import errno
import json
import os
import resource
from pathlib import Path

import pytest

from lambdascale.cli import doctor
from lambdascale.core import UserError
from lambdascale.diagnostics import checks
from lambdascale.diagnostics import disk as disk_module
from lambdascale.diagnostics.checks import TorchFacts
from lambdascale.diagnostics.disk import MIB, measure

NO_GPU = TorchFacts("2.0.0+cpu", 4)


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write a fake file system of ``files`` (path to text) below ``root``; return ``root``."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def doctor_run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["doctor", *arguments])
    status = parsed.run(parsed)
    assert isinstance(status, int)
    return status


def port(device: str, number: int, state: str) -> dict[str, str]:
    folder = f"sys/class/infiniband/{device}/ports/{number}"
    return {f"{folder}/state": state, f"{folder}/rate": "400 Gb/sec (4X NDR)", f"{folder}/link_layer": "InfiniBand"}


def test_cpu(tmp_path: Path) -> None:
    info = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f amx_tile"
    check = checks.cpu(tree(tmp_path, {"proc/cpuinfo": info}))
    assert check.status == "ok"
    assert check.found.startswith("Some CPU @ 2 GHz, ")
    assert check.found.endswith("avx2 avx512 amx")


def test_cpu_without_vectors(tmp_path: Path) -> None:
    assert checks.cpu(tree(tmp_path, {"proc/cpuinfo": "model name : Old\nflags : fpu sse"})).status == "warning"


MEMINFO = {"proc/meminfo": "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB"}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"}, None),
        (
            {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/memory.max": "2147483648", "sys/fs/cgroup/a/b/memory.max": "max"},
            2**31,
        ),
        ({"proc/self/cgroup": "5:cpu:/\n4:memory:/x\n0::/", "sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824"}, 2**30),
        (
            {"proc/self/cgroup": "4:cpu,memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"},
            2**63 - 4096,
        ),
    ],
)
def test_cgroup_limit(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    root = tree(tmp_path, MEMINFO | files)
    assert checks.cgroup_limit(root) == limit
    check = checks.memory(root)
    assert check.found.startswith("16.0 GiB total, 8.0 GiB available")
    lower = limit is not None and limit < 2**34
    assert check.status == ("warning" if lower else "ok")
    assert ("control group limit" in check.found) == lower == bool(check.advice)


def test_memory_unknown(tmp_path: Path) -> None:
    assert checks.memory(tmp_path).status == "warning"


def test_torch() -> None:
    assert checks.torch_build(NO_GPU).found == "2.0.0+cpu, 4 threads, no CUDA in this build"
    assert "CUDA 13.0" in checks.torch_build(TorchFacts("2", 4, "13.0")).found
    missing = checks.torch_build(TorchFacts(error="not installed"))
    assert (missing.status, missing.found) == ("missing", "not installed")
    assert "pip install" in missing.advice


def test_gpus_seen(tmp_path: Path) -> None:
    check = checks.gpus(TorchFacts("2", 4, "13.0", (("Big GPU", 80 * 2**30), ("Small GPU", 2**30))), tmp_path)
    assert (check.status, check.found) == ("ok", "0: Big GPU, 80.0 GiB; 1: Small GPU, 1.0 GiB")


def test_no_gpu(tmp_path: Path) -> None:
    assert checks.gpus(NO_GPU, tmp_path).status == "missing"


@pytest.mark.parametrize(("driver", "index"), [("580.65.06", "/cu130"), ("535.104.05", "/cu126"), (None, "driver 580 or newer")])
def test_which_torch_for_the_driver(tmp_path: Path, driver: str | None, index: str) -> None:
    version = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sat Aug 19 01:15:15 UTC 2023"
    files = {"dev/nvidia0": "", "dev/nvidiactl": ""} | ({"proc/driver/nvidia/version": version} if driver else {})
    check = checks.gpus(NO_GPU, tree(tmp_path, files))
    assert (check.status, check.found) == ("warning", "1 NVIDIA device in /dev, but no torch with CUDA")
    assert index in check.advice


def test_torch_that_cannot_use_the_gpus(tmp_path: Path) -> None:
    check = checks.gpus(TorchFacts("2", 4, "13.0"), tree(tmp_path, {"dev/nvidia0": "", "dev/nvidia1": ""}))
    assert check.status == "warning"
    assert "driver" in check.advice


def test_network(tmp_path: Path) -> None:
    files = {
        "lo/operstate": "unknown",
        "eth0/operstate": "up",
        "eth0/speed": "100000",
        "eth1/operstate": "down",
        "eth1/speed": "-1",
    }
    root = tree(tmp_path, {f"sys/class/net/{name}": text for name, text in files.items()} | {"sys/class/net/bonding_masters": ""})
    check = checks.network(root)
    assert (check.status, check.found) == ("ok", "eth0 up 100000 Mbit/s; eth1 down")


def test_network_down_or_absent(tmp_path: Path) -> None:
    assert checks.network(tree(tmp_path, {"sys/class/net/lo/operstate": "unknown"})).status == "missing"
    assert checks.network(tree(tmp_path, {"sys/class/net/eth0/operstate": "down"})).status == "warning"


def test_rdma_present(tmp_path: Path) -> None:
    root = tree(tmp_path, port("mlx5_0", 1, "4: ACTIVE") | port("mlx5_1", 1, "1: DOWN") | {"dev/infiniband/uverbs0": ""})
    check = checks.rdma(root)
    assert (check.status, check.advice) == ("ok", "")
    assert check.found.startswith("mlx5_0 port 1: ACTIVE, 400 Gb/sec (4X NDR), InfiniBand; mlx5_1 port 1: DOWN")


def test_rdma_absent(tmp_path: Path) -> None:
    check = checks.rdma(tmp_path)
    assert (check.status, check.found) == ("missing", "none")
    assert "modprobe rdma_rxe" in check.advice
    assert "--transport rdma" in check.advice


def test_rdma_unusable(tmp_path: Path) -> None:
    root = tree(tmp_path, port("mlx5_0", 1, "1: DOWN"))
    assert "/dev/infiniband" in checks.rdma(root).advice
    check = checks.rdma(tree(root, {"dev/infiniband/uverbs0": ""}))
    assert check.status == "warning"
    assert "no port is active" in check.advice


@pytest.mark.parametrize(
    ("soft", "status", "found"),
    [
        (resource.RLIM_INFINITY, "ok", "unlimited"),
        (2**31, "ok", "2.0 GiB"),
        (2**30, "ok", "1.0 GiB"),
        (2**23, "warning", "8 MiB"),
    ],
)
def test_memory_lock(soft: int, status: str, found: str) -> None:
    check = checks.memory_lock((soft, resource.RLIM_INFINITY))
    assert (check.status, check.found) == (status, found)
    for cure in ("ulimit -l unlimited", "limits.conf", "--ulimit memlock=-1"):
        assert (cure in check.advice) == (status == "warning")


def test_memory_lock_of_this_process() -> None:
    assert checks.memory_lock() == checks.memory_lock(resource.getrlimit(resource.RLIMIT_MEMLOCK))
    assert "as root" in checks.memory_lock((2**16, 2**16)).advice


def test_pyverbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pip install" in checks.pyverbs("no_such_module_of_ours").advice
    tree(
        tmp_path / "site-packages",
        {"verbs_of_a_test.py": "", "broken_verbs_of_a_test.py": "raise ImportError('libibverbs.so.1: no')"},
    )
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    assert checks.pyverbs("verbs_of_a_test") == checks.Check("pyverbs", "ok", "from PyPI")
    broken = checks.pyverbs("broken_verbs_of_a_test")
    assert (broken.status, broken.found) == ("warning", "cannot be imported: libibverbs.so.1: no")


@pytest.mark.parametrize(
    ("file", "who"),
    [
        ("/usr/lib/python3/dist-packages/pyverbs/device.so", "the distribution's python3-pyverbs"),
        ("/usr/lib64/python3.12/site-packages/pyverbs/device.so", "the distribution's python3-pyverbs"),
        ("/usr/local/lib/python3.11/dist-packages/pyverbs/device.so", "from PyPI"),
        ("/venv/lib/python3.11/site-packages/pyverbs/device.so", "from PyPI"),
        ("/src/rdma-core/build/pyverbs/device.so", "from /src/rdma-core/build/pyverbs"),
    ],
)
def test_origin(file: str, who: str) -> None:
    assert checks.origin(Path(file)) == who


def test_gpudirect(tmp_path: Path) -> None:
    assert checks.gpudirect(tmp_path).status == "missing"
    assert checks.gpudirect(tree(tmp_path, {"proc/modules": "nvidia_peermem 16384 0 - Live 0x0"})).status == "ok"


@pytest.mark.parametrize(("blocks", "status"), [(2**19, "ok"), (2**14, "warning")])
def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, status: str) -> None:
    space = os.statvfs_result((4096, 4096, blocks, blocks, blocks, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: space)
    assert checks.shared_memory(tmp_path).status == status


def test_no_shared_memory(tmp_path: Path) -> None:
    assert checks.shared_memory(tmp_path).status == "missing"


def test_disk_measured(tmp_path: Path) -> None:
    speed = measure(tmp_path, 4 * MIB)
    assert speed.cold > 0
    assert speed.warm > 0
    assert speed.direct is None or speed.direct > 0
    assert not list(tmp_path.iterdir())


def test_a_buffer_smaller_than_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "_LARGEST_BUFFER", MIB)
    assert measure(tmp_path, 3 * MIB).warm > 0


@pytest.mark.parametrize("at", ["open", "preadv"])
def test_no_direct_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Some file systems refuse O_DIRECT when the file is opened, others when it is read."""
    real_open, real_read = os.open, os.preadv
    direct: set[int] = set()

    def opened(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT and at == "open":
            raise OSError(errno.EINVAL, "no O_DIRECT")
        descriptor = real_open(path, flags & ~os.O_DIRECT, mode)
        direct.update({descriptor} if flags & os.O_DIRECT else ())
        return descriptor

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return real_read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", read)
    assert "O_DIRECT not supported here" in disk_module.disk(tmp_path, 1).found


@pytest.mark.parametrize("function", ["fsync", "posix_fadvise", "preadv"])
def test_a_failing_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(UserError, match="No space left on device"):
        measure(tmp_path, MIB)
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize("function", ["_open_direct", "_read"])
def test_an_interrupted_measurement_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(disk_module, function, interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, MIB)
    assert not list(tmp_path.iterdir())


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_run("--json", "--disk", str(tmp_path), "--disk-mib", "1") == 0
    found = json.loads(capsys.readouterr().out)["checks"]
    assert all(list(check) == ["name", "status", "found", "advice"] for check in found)
    assert {check["status"] for check in found} <= {"ok", "missing", "warning"}
    assert all(check["found"] and (check["status"] == "ok") == (not check["advice"]) for check in found)
    names = [check["name"] for check in found]
    assert names[:3] == ["CPU", "memory", "torch"]
    assert names[-1] == "disk"


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_run("--no-disk", "--disk", "/no/such/directory") == 0
    shown = capsys.readouterr().out
    assert "what to do" in shown
    assert "disk" not in shown


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="not a directory"):
        doctor_run("--disk", str(tmp_path / "none"))
    with pytest.raises(UserError, match="--disk-mib must be positive, not 0"):
        doctor_run("--disk", str(tmp_path), "--disk-mib", "0")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="not writable"):
        doctor_run("--disk", str(tmp_path))
