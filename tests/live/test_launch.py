"""Environment of node processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lambdascale.live.controller.launch import LocalLauncher
from lambdascale.live.node.start import StartParts

PROGRAM = """
import os
from pathlib import Path
from multiprocessing import forkserver, get_context
from lambdascale.live.controller.launch import LocalLauncher


def tell(connection):
    # glibc cuts the variable at its colons when it reads it.
    words = Path(f"/proc/{os.getppid()}/environ").read_bytes().decode().split("\\0")
    connection.send(":".join(word.removeprefix("GLIBC_TUNABLES=") for word in words if "glibc." in word))


if __name__ == "__main__":
    LocalLauncher()
    ours, theirs = get_context("forkserver").Pipe()
    get_context("forkserver").Process(target=tell, args=(theirs,)).start()
    print(ours.recv(), os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.mark.parametrize(
    ("before", "nodes", "after"),
    [
        (None, "glibc.cpu.x86_non_temporal_threshold=0x100000", "None"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.cpu.x86_non_temporal_threshold=0x100000", None),
        ("glibc.cpu.x86_non_temporal_threshold=0x200000", "glibc.cpu.x86_non_temporal_threshold=0x200000", None),
    ],
)
def test_nodes_copy_past_the_caches_and_nobody_else_does(
    before: str | None, nodes: str, after: str | None, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {key: value for key, value in os.environ.items() if key not in ("GLIBC_TUNABLES", "PYTEST_CURRENT_TEST")}
    environment |= {} if before is None else {"GLIBC_TUNABLES": before}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [nodes, after or before]


def _node(config: Any, launched: float) -> None:
    """Stand in for a node: note the process and the GPU of the spare it was, if any."""
    config.notes.joinpath(str(config.node)).write_text(
        f"{os.getpid()} {getattr(config, 'gpu', '-')} {launched <= time.monotonic()} {getattr(config, 'models', '')}"
    )


def _spare(gpu: int | None, models: Sequence[tuple[str, str]], connection: Connection) -> None:
    try:
        config, launched = connection.recv()
    except EOFError:
        return
    config.gpu, config.models = gpu, models
    _node(config, launched)


class TestSpares:
    """Nodes that are spare processes turned into one."""

    @staticmethod
    def start(launcher: LocalLauncher, notes: Path, *nodes: int) -> dict[int, list[str]]:
        launcher.start([SimpleNamespace(node=node, notes=notes) for node in nodes])  # type: ignore[misc]  # a stand-in
        for node in nodes:
            launcher._processes[node].join(60)
        return {node: notes.joinpath(str(node)).read_text().split() for node in nodes}

    def test_a_node_takes_the_spare_of_its_gpu(self, tmp_path: Path) -> None:
        launcher = LocalLauncher(spares=1, gpus=2, models=("m",), main=_node, spare_main=_spare)  # type: ignore[arg-type]  # a name
        first = self.start(launcher, tmp_path, 0, 1)
        assert [found[1:] for found in first.values()] == [["-", "True"]] * 2, "no spare is ready at first"
        spares = {spare.gpu: spare.process.pid for spare in launcher._spares}
        second = self.start(launcher, tmp_path, 1, 3)
        assert second[1] == [str(spares[1]), "1", "True", "('m',)"], "its kernels are those of the models"
        assert second[3][1:] == ["-", "True"], "GPU 1 has no second spare"
        assert sorted(str(spare.gpu) for spare in launcher._spares) == ["0", "1"], "the one taken has a successor"
        left = [spare.process for spare in launcher._spares]
        launcher.close()
        assert not any(process.is_alive() for process in left)

    def test_a_spare_that_has_died_is_not_missed(self, tmp_path: Path) -> None:
        launcher = LocalLauncher(spares=1, main=_node, spare_main=_spare)
        launcher.refill()
        (spare,) = launcher._spares
        assert spare.gpu is None
        spare.process.kill()
        spare.process.join(60)
        assert self.start(launcher, tmp_path, 0)[0][1:] == ["-", "True"]
        launcher.close()

    def test_a_start_that_was_broken_off(self, tmp_path: Path) -> None:
        """Nodes that have not been started are killed with the others."""
        launcher = LocalLauncher(main=_node, spare_main=_spare)
        self.start(launcher, tmp_path, 0)
        for node in (0, 1):
            launcher.kill(node)
        launcher.close()

    def test_none_unless_asked_for(self, tmp_path: Path) -> None:
        launcher = LocalLauncher(main=_node, spare_main=_spare)
        self.start(launcher, tmp_path, 0)
        assert not launcher._spares
        launcher.close()


def test_parts_of_a_start() -> None:
    now = [5.0]
    parts = StartParts(4.5, clock=lambda: now[0])
    with parts.part("imports"):
        now[0] += 2.0
    assert parts.seconds == {"process": 0.5, "imports": 2.0}
    assert StartParts(None).seconds == {}
