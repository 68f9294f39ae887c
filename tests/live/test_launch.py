"""Environment of node processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
