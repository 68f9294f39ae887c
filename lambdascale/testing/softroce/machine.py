"""Boot of the machine, which runs one command in the repository's folder with this Python's environment."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

from lambdascale.testing.softroce.kernel import ensure_kernel
from lambdascale.testing.softroce.packages import PYVERBS, ensure_packages, find

# Under emulation, page table switches (mitigations) and every clock except the TSC are slow.
_KERNEL_LINE = "console=ttyS0 panic=-1 quiet mitigations=off clocksource=tsc tsc=reliable nowatchdog audit=0"
_TIMED_OUT = 124  # as in timeout(1)
_FAILED = 125


@dataclass(frozen=True, kw_only=True)
class Wire:
    """One end of a cable between two guests: a TCP port of this host's loopback; one end listens. ``host``: 10.77.0.HOST."""

    port: int
    listens: bool
    host: int

    @property
    def address(self) -> str:
        """IP address of the guest on the cable."""
        return f"10.77.0.{self.host}"


@dataclass(frozen=True)
class Outcome:
    """Exit status of the command (124: timeout, 125: the machine failed), its whole output, and the time it took."""

    status: int
    output: str
    wall_s: float


@dataclass
class Machine:
    """A running guest; ``wait`` for its end or ``close`` it."""

    process: subprocess.Popen[bytes]
    control: tempfile.TemporaryDirectory[str]
    timeout_s: float
    began: float = field(default_factory=time.monotonic)

    def wait(self, echo: IO[str] | None = None) -> Outcome:
        """Wait until the guest switches itself off or its time is up; copy its output to ``echo`` meanwhile."""
        pieces: list[str] = []
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        late = False
        while not late and self.process.poll() is None:
            late = time.monotonic() > self.began + self.timeout_s
            self._read(pieces, echo)
            time.sleep(0.05)
        self.process.kill()
        self.process.wait()
        self._read(pieces, echo)
        outcome = Outcome(self._status(late, pieces), "".join(pieces), time.monotonic() - self.began)
        self.close()
        return outcome

    def _read(self, pieces: list[str], echo: IO[str] | None) -> None:
        assert self.process.stdout is not None
        while data := self.process.stdout.read(65536):
            pieces.append(data.decode(errors="replace"))
            if echo is not None:
                echo.write(pieces[-1])
                echo.flush()

    def _status(self, late: bool, pieces: list[str]) -> int:
        folder = Path(self.control.name)
        if (folder / "status").exists():
            return int((folder / "status").read_text())
        if late:
            pieces.append(f"\nsoftroce: timeout after {self.timeout_s:g} s\n")
            return _TIMED_OUT
        console = (folder / "console").read_text(errors="replace") if (folder / "console").exists() else ""
        pieces.append("\nsoftroce: the machine stopped before the command ended; end of its console:\n" + console[-2000:])
        return _FAILED

    def close(self) -> None:
        """Kill the guest if it runs, and delete its control folder."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.control.cleanup()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def run(
    command: Sequence[str],
    *,
    timeout_s: float = 300.0,
    memory_mib: int = 3072,
    results: Path | None = None,
    environment: Mapping[str, str] | None = None,
    echo: IO[str] | None = None,
) -> Outcome:
    """Run a command in a new guest; UserError if this machine lacks what a guest needs.

    The guest sees this machine's files; its changes are lost, except in ``results``, its /run/results. It has two RDMA
    devices: rxe0 on the loopback, rxe1 on a dummy interface.
    """
    ensure_packages()
    with start(command, timeout_s=timeout_s, memory_mib=memory_mib, results=results, environment=environment) as machine:
        return machine.wait(echo)


def start(
    command: Sequence[str],
    *,
    timeout_s: float = 300.0,
    memory_mib: int = 3072,
    results: Path | None = None,
    environment: Mapping[str, str] | None = None,
    wire: Wire | None = None,
) -> Machine:
    """Boot a guest; with a ``wire``, its only RDMA device rxe0 is on a cable to another guest. UserError without a kernel."""
    kernel = ensure_kernel()
    control = tempfile.TemporaryDirectory(prefix="softroce-")
    folder = Path(control.name)
    (folder / "start").write_text(_script(command, environment or {}, wire))
    shares = [("rootfs", Path("/"), True), ("control", folder, False)]
    if results is not None:
        shares.append(("results", results, False))
    arguments = [
        find("qemu-system-x86_64") or "qemu-system-x86_64",
        # Without -enable-kvm: in containers /dev/kvm may exist and fail, and two emulated cores are enough.
        *("-machine", "q35", "-cpu", "max,la57=off", "-m", str(memory_mib), "-smp", "2"),
        *("-display", "none", "-monitor", "none", "-nodefaults", "-no-reboot"),
        *("-serial", f"file:{folder / 'console'}", "-serial", "stdio"),
        *("-kernel", str(kernel.image), "-initrd", str(kernel.initrd), "-append", _KERNEL_LINE),
        *[argument for share in shares for argument in _share(*share)],
        *(_cable(wire) if wire is not None else []),
    ]
    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return Machine(process, control, timeout_s)


def _share(tag: str, path: Path, readonly: bool) -> list[str]:
    options = f"local,id={tag},path={path},security_model=none,multidevs=remap" + ",readonly=on" * readonly
    return ["-fsdev", options, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]


def _cable(wire: Wire) -> list[str]:
    end = "listen" if wire.listens else "connect"
    card = f"virtio-net-pci,netdev=cable,mac=52:54:00:77:00:{wire.host:02x}"
    return ["-netdev", f"socket,id=cable,{end}=127.0.0.1:{wire.port}", "-device", card]


_ALONE = """\
ip link set lo up
ip link add d0 mtu 1500 type dummy && ip address add 10.78.0.1/24 dev d0 && ip link set d0 up
rdma link add rxe0 type rxe netdev lo
rdma link add rxe1 type rxe netdev d0
"""


def _wired(wire: Wire) -> str:
    return f"""\
ip link set lo up
ip link set eth0 mtu 4500 up && ip address add {wire.address}/24 dev eth0
rdma link add rxe0 type rxe netdev eth0
"""


def _script(command: Sequence[str], environment: Mapping[str, str], wire: Wire | None) -> str:
    """Script of the guest after its boot: make devices, then run the command with its output on the second serial port."""
    here = Path.cwd()
    beside = Path(sys.executable).parent
    variables = {
        "HOME": os.environ.get("HOME", "/root"),
        "LANG": "C.UTF-8",
        "PATH": f"{beside}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        # pyverbs alone, without the other packages of the distribution's Python.
        "PYTHONPATH": f"/run/pyverbs:{here}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SOFTROCE": "1",
        **environment,
    }
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    return f"""\
stty -F /dev/ttyS1 raw -echo
exec </dev/null >/dev/ttyS1 2>&1
{exports}hostname softroce
mkdir /run/pyverbs && ln -s {PYVERBS} /run/pyverbs/pyverbs
ulimit -l unlimited
{_ALONE if wire is None else _wired(wire)}cd {shlex.quote(str(here))} || exit
{shlex.join(command)}
echo $? >/run/softroce/status.tmp && mv /run/softroce/status.tmp /run/softroce/status
"""
