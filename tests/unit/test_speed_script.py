"""scripts/speed.py: one case in this tree, the comparison with a commit, mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def speed(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "speed.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )


def test_the_same_case_has_the_same_results() -> None:
    first, second = (json.loads(speed("--one", "burst").stdout) for _ in range(2))
    assert first["results"] == second["results"]
    assert first["events"] == second["events"] > 100


def test_mistakes_are_named() -> None:
    assert "no such case: bursts" in speed("--against", "HEAD", "bursts").stderr
    assert "--against COMMIT" in speed("burst").stderr
    unknown = speed("--against", "no-such-commit", "burst")
    assert unknown.returncode == 1
    assert "git archive no-such-commit" in unknown.stderr
