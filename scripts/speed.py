"""Compare the simulator's speed with another commit's: python scripts/speed.py --against COMMIT [CASE ...] [--rounds N].

Unpacks COMMIT into a temporary folder and drives each case in both trees in alternation, every time in a fresh process. Prints
the smallest and the median process time, their ratio to COMMIT's, events, microseconds per event, and whether both trees made the
same events and commands. Only the simulation or the planning is timed; a process time is disturbed least by other work on the
machine, its minimum less than its median. ``azure`` cases need the Azure conversation trace in $LAMBDASCALE_TRACES.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRACE = Path(os.environ.get("LAMBDASCALE_TRACES", "data/traces"), "AzureLLMInferenceTrace_conv.csv").absolute()
_FIXED = ["autoscaler@system.autoscaler=fixed", "system.autoscaler.min_replicas=8", "system.batching.max_batch=64"]
_AZURE = ["model=llama2_7b", "workload=azure", f"workload.path={TRACE}"]
# Overrides of conf/run.yaml. ``azure``, ``rows`` and ``columns``: as tests/benchmarks; the last two make the table of requests
# too, ``columns`` with the gaps between tokens where the commit has them.
CASES = {
    "azure": [*_AZURE, *_FIXED],
    "rows": [*_AZURE, *_FIXED],
    "columns": [*_AZURE, *_FIXED],
    "serving": _AZURE,
    **{
        name: ["experiment=quickstart", f"system={name}"]
        for name in ("lambdascale", "faasnet", "nccl_broadcast", "serverlessllm", "ideal")
    },
    "burst": ["workload=burst", "workload.count=20"],
    "planning": [],
}


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="lambdascale-speed-") as folder:
        _unpack(arguments.against, Path(folder))
        print(f"{'case':15}{'tree':10}{'min s':>8}{'median':>8}{'ratio':>7}{'median':>8}{'events':>9}{'us/event':>10}  results")
        for case in arguments.cases:
            trees = {arguments.against[:9]: Path(folder), "this": ROOT}
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
            for _ in range(arguments.rounds):
                for name, tree in trees.items():
                    found[name].append(_measured(case, tree))
            _show(case, found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--against", metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="runs of each case in each tree (default: 5)")
    parser.add_argument("--one", choices=CASES, metavar="CASE", help="run one case in the tree of PYTHONPATH, print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_run(arguments.one)))
        sys.exit()
    unknown = sorted({*arguments.cases} - {*CASES})
    if unknown or arguments.against is None or arguments.rounds < 1:
        parser.error(f"no such case: {', '.join(unknown)}" if unknown else "--against COMMIT and at least one round are needed")
    arguments.cases = arguments.cases or list(CASES)
    return arguments


def _unpack(commit: str, folder: Path) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"git archive {commit}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def _measured(case: str, tree: Path) -> dict[str, Any]:
    """Return what a process of ``tree`` printed about one run of ``case``."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", case]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree, check=False)
    if done.returncode:
        sys.exit(f"{case} in {tree}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _show(case: str, found: dict[str, list[dict[str, Any]]]) -> None:
    base, *_ = found
    same = len({run["results"] for runs in found.values() for run in runs}) == 1
    before = [run["seconds"] for run in found[base]]
    for name, runs in found.items():
        seconds, events = [run["seconds"] for run in runs], runs[0]["events"]
        least, middle = min(seconds), median(seconds)
        ratios = f"{least / min(before):7.2f}{middle / median(before):8.2f}"
        print(
            f"{case:15}{name:10}{least:8.3f}{middle:8.3f}{ratios}{events:9}{least / events * 1e6:10.2f}  "
            + ("" if name == base else "same" if same else "differ"),
            flush=True,
        )


def _run(case: str) -> dict[str, Any]:
    """Run a case with the package of PYTHONPATH; nothing but the run itself is timed."""
    if case == "planning":
        return _plan()
    from lambdascale.core.events import Event
    from lambdascale.experiments.build import build
    from lambdascale.experiments.compose import compose
    from lambdascale.experiments.runner import drive_experiment
    from lambdascale.metrics import Recorder, requests_table

    experiment = build(compose(CASES[case]))
    requests = experiment.workload.load(models=[model.name for model in experiment.models], seed=1).requests
    recorder = Recorder()
    if case == "columns" and hasattr(experiment, "token_times"):
        experiment = replace(experiment, token_times=True)
    begin = time.process_time()
    driven = drive_experiment(experiment, requests, 1, recorder)
    if case == "columns" and hasattr(driven, "token_gaps"):
        requests_table(recorder, case, requests, (), driven.token_gaps)
    elif case in {"rows", "columns"}:
        requests_table(recorder, case)
    seconds = time.process_time() - begin
    events = sum(isinstance(entry, Event) for _, entry in recorder.entries)
    return {"seconds": seconds, "events": events, "results": _digest(recorder.entries)}


def _plan() -> dict[str, Any]:
    """Plan as tests/benchmarks do, with nothing cached; an event is a send."""
    from lambdascale.multicast import BinomialPipeline
    from lambdascale.pipelines import ComplementaryPipelines

    planner, found, begin = BinomialPipeline(), [], time.process_time()
    for sources, nodes, blocks in ((1, 8, 16), (1, 128, 64), (1, 1024, 64), (2, 12, 16), (4, 1024, 64)):
        plan = planner.plan(sources=sources, destinations=nodes - sources, blocks=blocks)
        found.append((plan, [*ComplementaryPipelines().pipelines(plan)] if sources > 1 else []))
    seconds = time.process_time() - begin
    return {"seconds": seconds, "events": sum(len(r) for plan, _ in found for r in plan.rounds), "results": _digest(found)}


def _digest(results: object) -> str:
    return hashlib.sha256(repr(results).encode()).hexdigest()


if __name__ == "__main__":
    main()
