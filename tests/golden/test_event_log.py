"""One small run, event by event: a change of behaviour shows up as a diff one can read.

After an intended change: LAMBDASCALE_GOLDEN=write python -m pytest tests/golden, and read the diff.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lambdascale.control import build_system, drive
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.metrics import Recorder, events_table
from lambdascale.sim import SimConfig
from lambdascale.testing.systems import burst, small_cluster, small_model

GOLDEN = Path(__file__).with_name("lambdascale_burst.txt")


def log() -> str:
    """λScale, four nodes, a burst of 16 from one replica: multicast, pipelines, mode switch, release."""
    config = replace(build(compose()).system, blocks=4)
    cluster, model = small_cluster(4), small_model()
    backend = SimConfig().build(cluster=cluster, models=[model], requests=burst(16), batching=config.batching, seed=0)
    recorder = Recorder()
    drive(build_system(config, cluster=cluster, models=[model]), backend, [recorder])
    lines = []
    for row in events_table(recorder).to_pylist():
        shown = " ".join(
            f"{key}={value}" for key, value in row.items() if value is not None and key not in ("seq", "at_s", "kind")
        )
        lines.append(f"{row['at_s']:.6f} {row['kind']} {shown}".rstrip())
    return "\n".join(lines) + "\n"


def test_event_log() -> None:
    if os.environ.get("LAMBDASCALE_GOLDEN") == "write":
        GOLDEN.write_text(log())
    assert log() == GOLDEN.read_text()
