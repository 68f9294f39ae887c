"""The same runs under python -O, which leaves assertions out: nothing may depend on what they do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CODE = """
import runpy, sys
assert False, "python -O leaves this out"
print(runpy.run_path(sys.argv[1])[sys.argv[2]](), end="")
"""


@pytest.mark.parametrize("run", ["kv_copy", "death_in_a_multicast"])
def test_runs_are_the_same_without_assertions(run: str) -> None:
    command = [sys.executable, "-O", "-c", CODE, str(HERE / "test_event_log.py"), run]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == (HERE / f"{run}.txt").read_text()
