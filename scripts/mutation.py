"""Measure how many small faults the tests notice: python scripts/mutation.py [PART ...] [--sample N] [--work DIR] [--children N].

Runs mutmut (pip install "mutmut>=3.8"; not part of the dev extra and not in CI) over a copy of the checkout, one part after
another, each under the fast tests that concern it, and prints the share of killed mutants and the survivors. The copy is made in
DIR (default: a temporary folder), where ``mutmut show NAME`` then shows a survivor. About a mutant a second on one core;
``--sample N`` tries N mutants of each part, drawn with a fixed seed.

Two departures from a plain ``mutmut run``: ``lru_cache`` decorators are removed in the copy, since mutmut skips decorated
functions, and a cache filled before a mutant is switched on would hide it; lines of assertions are not mutated, since no test
reaches the failure of an invariant of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS = 33  # mutmut's status of a mutant that no test reaches
COPIED = ("lambdascale", "baselines", "conf", "tests", "scripts", "pyproject.toml")


@dataclass(frozen=True)
class Part:
    """Files to mutate, as patterns, and the tests that should notice, as arguments of pytest."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


PARTS = {
    "multicast": Part(
        ("lambdascale/multicast/*", "baselines/*/planner.py"),
        (
            "tests/policy/test_planners.py",
            *(
                f"tests/property/test_multicast_binomial.py::test_{name}"
                for name in (
                    "the_validator_names_what_is_wrong",
                    "a_declared_double_receive_is_valid_on_any_nodes",
                    "double_receives_happen_exactly_where_they_are_declared",
                    "three_blocks_at_once_are_never_valid",
                    "the_shape_of_a_plan",
                    "k_way_rounds_and_first_pipeline",
                    *(f"lower_bound_is_met_for_every_number_of_nodes[{nodes}]" for nodes in (5, 11, 14, 23)),
                )
            ),
        ),
    ),
    "pipelines": Part(("lambdascale/pipelines/*",), ("tests/policy/test_pipelines.py", "tests/policy/test_pipeline_rules.py")),
    "control": Part(
        ("lambdascale/control/*",),
        (
            *("tests/policy", "tests/unit/test_control_batching.py", "tests/unit/test_control_autoscaler.py"),
            *("tests/unit/test_control_turns.py", "tests/property/test_control_batching_properties.py"),
            *("tests/property/test_calm_properties.py", "tests/property/test_scale_in_properties.py"),
            *("tests/property/test_traffic_properties.py", "tests/golden"),
        ),
    ),
    "sim": Part(
        ("lambdascale/sim/*",),
        (
            *("tests/unit/test_sim_instances.py", "tests/unit/test_sim_transfers.py", "tests/unit/test_sim_loads.py"),
            "tests/unit/test_sim_corners.py",
            *("tests/unit/test_sim_sharing.py", "tests/unit/test_sim_compute.py", "tests/unit/test_multicast_rates.py"),
            *("tests/policy/test_simulator.py", "tests/policy/test_several_gpus.py"),
            *("tests/property/test_sim_links_properties.py", "tests/property/test_sim_transfers_properties.py", "tests/golden"),
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutate the policy and the simulator, and count the mutants that tests kill.")
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--sample", type=int, metavar="N", help="mutants to try in each part (default: all)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the copies and results here")
    parser.add_argument("--children", type=int, default=1, metavar="N", help="mutants tested at once (default: %(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part named {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    work = arguments.work or Path(tempfile.mkdtemp(prefix="mutation-"))
    counts = {name: measure(PARTS[name], work / name, arguments) for name in arguments.parts}
    for name, (killed, total) in counts.items():
        print(f"{name}: {killed} of {total} mutants killed, {killed / max(1, total):.1%}; survivors: {work / name}/survivors.txt")


def measure(part: Part, folder: Path, arguments: argparse.Namespace) -> tuple[int, int]:
    """Mutate one part in ``folder``; return (mutants killed, mutants tried)."""
    copy_tree(folder)
    (folder / "setup.cfg").write_text(settings(part))
    chosen: list[str] = []
    if arguments.sample is not None:
        mutmut(folder, "run", "nothing.of.this.name", capture=True)  # makes the mutants and stops
        everything = sorted(outcomes(folder))
        chosen = random.Random(0).sample(everything, min(arguments.sample, len(everything)))
    mutmut(folder, "run", "--max-children", str(arguments.children), *chosen)
    tried = {name: code for name, code in outcomes(folder).items() if code is not None}
    alive = [name for name, code in tried.items() if code in (0, NO_TESTS)]
    (folder / "survivors.txt").write_text(
        "\n".join(f"=== {name}\n{mutmut(folder, 'show', name, capture=True)}" for name in alive)
    )
    return len(tried) - len(alive), len(tried)


def outcomes(folder: Path) -> dict[str, int | None]:
    """Return the tests' exit status for every mutant: 0 for a survivor, None for one that was not tried."""
    found: dict[str, int | None] = {}
    for path in (folder / "mutants").rglob("*.meta"):
        found |= json.loads(path.read_text())["exit_code_by_key"]
    return found


def copy_tree(folder: Path) -> None:
    """Copy the files that tests need to ``folder``, without caches of planners."""
    shown = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *COPIED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in ("lambdascale", "baselines", "tests"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in shown.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for path in [*(folder / "lambdascale").rglob("*.py"), *(folder / "baselines").rglob("*.py")]:
        path.write_text(re.sub(r"^@lru_cache\(.*\)\n", "", path.read_text(), flags=re.MULTILINE))


def settings(part: Part) -> str:
    """Return mutmut's settings for a part."""
    lists = {
        "source_paths": ("lambdascale", "baselines"),
        "only_mutate": part.files,
        "also_copy": ("conf", "scripts"),
        "do_not_mutate_patterns": (r"^\s*assert ",),
        "pytest_add_cli_args_test_selection": part.tests,
    }
    lines = [f"{name} =\n" + "".join(f"    {entry}\n" for entry in entries) for name, entries in lists.items()]
    # Workers come from a server that has run no test: no planner, configuration or example is kept from an earlier run.
    switches = "process_isolation = forkserver\nuse_git_change_detection = false\ntimeout_multiplier = 4\ntimeout_constant = 20\n"
    return f"[mutmut]\n{switches}{''.join(lines)}"


def mutmut(folder: Path, *arguments: str, capture: bool = False) -> str:
    """Run a mutmut command in ``folder``; return its output if ``capture``."""
    environment = os.environ | {"HYPOTHESIS_STORAGE_DIRECTORY": str(folder / ".hypothesis"), "HYPOTHESIS_PROFILE": "mutation"}
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=capture, text=True, check=arguments[0] != "run")
    return done.stdout if capture else ""


if __name__ == "__main__":
    main()
