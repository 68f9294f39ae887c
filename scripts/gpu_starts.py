"""Time a replica's start from nothing to its first token: a new process, and a spare one that takes a lost node's place.

python scripts/gpu_starts.py --model DIR|NAME [--blocks 16] [--device cuda] [--repeat 3] [--out results/tables]

Cold: from the start of this interpreter (a process of its own for each run) to the first token of a request that waits. Warm: the
node of a running cluster is killed, and a spare process takes its place; from the kill to the first token of a request that comes
then. The cluster is one node; weights come from where the packed model is. Adds rows to gpu_starts.csv.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lambdascale.live.forkserver import prepare

_SPARE_S = 12.0  # second of the run at which the node is killed: its spare is ready by then
_PROMPT, _OUTPUT = 512, 8


def one(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a cluster of one node in this process; return the seconds of its start and those of its parts."""
    prepare()
    from lambdascale.control import build_system, drive
    from lambdascale.core import traced
    from lambdascale.core.events import BlockArrived, Event, TokensProduced
    from lambdascale.experiments.build import build
    from lambdascale.experiments.compose import compose

    experiment = build(
        compose(
            [
                "cluster=testbed1",
                "cluster.nodes=1",
                "system=lambdascale",
                f"system.blocks={arguments.blocks}",
                "system.memory.enabled=false",
                "backend=live",
                "backend.paced=false",
                f"backend.device={arguments.device}",
                f"backend.checkpoint={arguments.model}",
                f"backend.slot_tokens={_PROMPT + _OUTPUT}",
                *(["backend.spares=1", "backend.restarts=1"] if arguments.warm else []),
                "logger._target_=builtins.dict",
            ]
        )
    )
    name = experiment.models[0].name
    requests = [traced(0, 0.0, name, _PROMPT, _OUTPUT)]
    if arguments.warm:
        requests.append(traced(1, _SPARE_S, name, _PROMPT, _OUTPUT))
    imported = time.monotonic()
    plane = build_system(experiment.system, cluster=experiment.seen, models=experiment.models)
    backend = experiment.backend.build(
        cluster=experiment.cluster, models=experiment.models, requests=requests, system=experiment.system, seed=0
    )
    found: dict[str, Any] = {"up": time.monotonic()}

    def kill() -> None:
        found["killed"] = time.monotonic()
        backend.launcher.kill(0)

    class Watch:
        def on_event(self, event: Event) -> None:
            if isinstance(event, BlockArrived):
                found["loaded"] = time.monotonic()
            if isinstance(event, TokensProduced):
                found[f"token {event.request_id}"] = time.monotonic()
                if event.request_id == 0 and arguments.warm:
                    timer = threading.Timer(max(0.0, _SPARE_S - event.at), kill)
                    timer.daemon = True
                    timer.start()

        def on_command(self, at: float, command: object) -> None:
            pass

    try:
        drive(plane, backend, [Watch()])
    finally:
        backend.close()
    begin, end = ("killed", "token 1") if arguments.warm else ("", "token 0")
    since = found[begin] if begin else arguments.since
    until = {} if arguments.warm else {"until_asked": imported, "until_up": found["up"]}
    until |= {"until_loaded": found["loaded"]}
    return {"seconds": found[end] - since, "parts": backend.start_parts | {name: at - since for name, at in until.items()}}


def children(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run each start in an interpreter of its own, and yield its row."""
    for warm in (False, True):
        for run in range(1, arguments.repeat + 1):
            asked = ["--model", arguments.model, "--blocks", str(arguments.blocks), "--device", arguments.device]
            mode = ["--warm"] if warm else []
            command = [sys.executable, __file__, *asked, *mode, "--since", repr(time.monotonic())]
            done = subprocess.run(command, stdout=subprocess.PIPE, timeout=180, check=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            parts = {f"{name}_s": seconds for name, seconds in found["parts"].items()}
            yield (
                {"model": Path(arguments.model).name, "start": "warm" if warm else "cold", "run": run}
                | {"first_token_s": found["seconds"]}
                | parts
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="a packed model or a built-in one's name")
    parser.add_argument("--blocks", type=int, default=16, help="blocks of a built-in model (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="nodes compute on (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="starts of each kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/tables"), help="folder of the tables (default: %(default)s)")
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)  # a run of its own: when it was started
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.since is not None:
        print(json.dumps(one(arguments)))
        return
    import pandas as pd
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU on this machine; lambdascale doctor says more")
    card = "cpu" if arguments.device == "cpu" else f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "gpu_starts.csv"
    before = pd.read_csv(path) if path.exists() else pd.DataFrame()
    rows = []
    for row in children(arguments):
        rows.append(row | {"measured_on": f"{card}, torch {torch.__version__}"})
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        pd.concat([before, pd.DataFrame(rows)]).to_csv(path, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
