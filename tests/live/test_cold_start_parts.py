"""Parts of cold starts in a live run: they add up to each TTFT, with the set-up of a communicator among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lambdascale.core.commands import StartMulticast
from lambdascale.core.events import BlockArrived, SetUpDone
from lambdascale.metrics.ttft_parts import PARTS
from tests.live.harness import burst, of, run, system_of

pytestmark = pytest.mark.live


def test_set_ups_of_a_broadcast_over_gloo(tiny: Path) -> None:
    """Each destination reports the end of its set-up before its first block. Requests that arrived before the scale-out waited
    for all of the set-up if a new replica answers them, and for none of it if the source does.
    """
    outcome = run(tiny, burst(24), system=system_of("nccl_broadcast"), nodes=3, collective="gloo")
    rows = outcome.rows
    assert (rows.status == "ok").all()
    parts = rows[[f"{part}_s" for part in PARTS]]
    np.testing.assert_allclose(parts.sum(axis=1), rows.ttft_s, rtol=0, atol=1e-6)
    assert (parts >= 0).all(axis=None)
    (begin_s,) = [at for at, entry in outcome.recorder.entries if isinstance(entry, StartMulticast)]
    ready_s = {event.node: event.at for event in of(outcome, SetUpDone)}
    assert set(ready_s) == {1, 2}
    for node, at_s in ready_s.items():
        assert begin_s < at_s <= min(event.at for event in of(outcome, BlockArrived) if event.node == node)
    waited = rows[rows.setup_s > 0]
    assert len(waited)
    assert set(waited.setup_s.round(6)) <= {round(at_s - begin_s, 6) for at_s in ready_s.values()}
    assert (waited.transfer_s > 0).all()
