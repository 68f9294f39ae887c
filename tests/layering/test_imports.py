"""The package's layers: imports allowed between subpackages, and libraries allowed in each."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lambdascale

PACKAGE = Path(lambdascale.__file__).resolve().parent
ROOT = PACKAGE.parent

# Subpackages that each subpackage may import, itself aside. Dependencies point one way.
PURE = {"core"}
LIBRARY = PURE | {"multicast", "pipelines", "memory", "workload", "control"}
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "multicast": PURE,
    "pipelines": PURE | {"multicast"},
    "memory": PURE,
    "workload": PURE,
    "metrics": PURE,
    "exchange": PURE,
    "figures": PURE,
    "checkpoints": PURE,
    "transport": PURE,
    "control": PURE | {"multicast", "pipelines", "memory"},
    "sim": PURE | {"multicast", "control", "memory"},
    "inference": PURE | {"checkpoints", "control", "memory"},
    "diagnostics": PURE | {"transport"},
    "calibration": PURE | {"checkpoints", "control", "inference", "diagnostics"},
    "live": PURE | {"checkpoints", "control", "inference", "transport"},
    "testing": PURE | {"multicast", "pipelines", "memory", "control", "sim", "metrics", "transport"},
    # The composition root: objects from configuration, runs, studies and their tables.
    "experiments": LIBRARY | {"sim", "live", "metrics", "figures"},
    "explore": LIBRARY | {"sim", "metrics", "testing", "experiments"},
    "cli": LIBRARY
    | {"sim", "live", "metrics", "checkpoints", "transport", "diagnostics", "calibration", "experiments", "explore", "exchange"},
}
# Heavy or worldly libraries, and the only places that may import them.
ONLY_IN = {
    "torch": {"checkpoints", "diagnostics", "inference", "transport", "live", "calibration"},
    "wandb": {"metrics/wandb_sink.py"},
    "matplotlib": {"figures"},
    "seaborn": {"figures"},
    "hydra": {"experiments", "cli"},
    "omegaconf": {"experiments", "cli"},
    "zmq": {"live", "transport"},
    "pyverbs": {"transport"},
    "transformers": {"checkpoints"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of the modules a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_subpackage_has_its_place() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ALLOWED)


def test_dependencies_point_one_way() -> None:
    """No circle of subpackages: whoever is left over knows only those that were placed before it."""
    placed: set[str] = set()
    while ready := {layer for layer, known in ALLOWED.items() if layer not in placed and known <= placed}:
        placed |= ready
    assert placed == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0]
    for name in imported(path):
        assert not name.startswith("baselines"), "the package never imports baselines"
        parts = name.split(".")
        if parts[0] == "lambdascale" and len(parts) > 1 and layer in ALLOWED and (PACKAGE / parts[1]).is_dir():
            assert parts[1] in ALLOWED[layer] | {layer}, f"{layer} must not import {parts[1]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_stay_where_they_belong(path: Path) -> None:
    inside = path.relative_to(PACKAGE)
    for name in imported(path):
        allowed = ONLY_IN.get(name.split(".")[0])
        assert allowed is None or inside.parts[0] in allowed or inside.as_posix() in allowed, f"{inside} imports {name}"


@pytest.mark.parametrize("module", ["lambdascale.cli.main", "lambdascale.experiments.runner", "lambdascale.live.config"])
def test_commands_simulations_and_a_live_controller_start_without_torch(module: str) -> None:
    """The import of torch takes seconds, in which a controller has not asked for nodes."""
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_thread_waits_for_a_whole_device(path: Path) -> None:
    """Waits for a device are errors while another thread records a graph, in both: wait for a stream or an event."""
    alone = "calibration" in path.parts  # no node runs in such a process
    assert alone or not re.search(r"cuda\.synchronize\(|cudaDeviceSynchronize|cuCtxSynchronize", path.read_text())


def test_baselines_know_the_vocabulary_only() -> None:
    for path in sorted((ROOT / "baselines").rglob("*.py")):
        layers = {name.split(".")[1] for name in imported(path) if name.startswith("lambdascale.")}
        assert layers <= {"core", "multicast", "pipelines"}, path


@pytest.mark.parametrize(
    "module", ["lambdascale.control", "lambdascale.sim", "lambdascale.testing.planners", "lambdascale.workload"]
)
def test_what_gets_loaded(module: str) -> None:
    heavy = ["torch", "wandb", "matplotlib", "seaborn", "hydra", "omegaconf", "lambdascale.metrics"]
    heavy = heavy[:-1] if "testing" in module else heavy
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
