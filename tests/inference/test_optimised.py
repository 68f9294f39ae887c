"""Batched generation under python -O, which leaves assertions out: the tokens may not depend on what they do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("batched_run.py")


def generated(directory: Path, *options: str) -> Any:
    command = [sys.executable, *options, str(SCRIPT), str(directory)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)


def test_tokens_are_the_same_without_assertions(models: Callable[[str], Path]) -> None:
    usual, optimised = generated(models("llama")), generated(models("llama"), "-O")
    assert (usual["assertions"], optimised["assertions"]) == (True, False)
    assert [len(tokens) for tokens in usual["tokens"].values()] == [20 + number for number in range(9)]
    assert optimised["tokens"] == usual["tokens"]
