"""Record of a node's compute thread, row by row in a file: for measurements of mode switches (setting ``backend.timeline``).

Times are those of the host's monotonic clock, which all processes of a host share. They are taken on the host: on a GPU, a pass
through a stage that is not the last ends when its hidden states have been computed, one through the last with its tokens.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lambdascale.core import NodeId
from lambdascale.core.commands import Serve
from lambdascale.inference import BlockStore
from lambdascale.live import wire
from lambdascale.live.node.compute import Compute
from lambdascale.live.node.instance import Instance
from lambdascale.live.node.mode_switch import KvData
from lambdascale.live.node.runners import Hidden, Runner, TorchExecutor, TorchRunner
from lambdascale.live.node.switching import MakeKv, Switching

COLUMNS = ("node", "began_s", "took_s", "what", "instance", "layers", "decodes", "prefilled", "detail")


class Timeline:
    """Rows of one node. Each is in the file when its part has ended, so that a killed node loses none. For one thread."""

    def __init__(self, folder: Path, node: NodeId, clock: Callable[[], float] = time.monotonic) -> None:
        self._node, self._clock = node, clock
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"node-{node}.csv"
        new = not path.exists()
        self._file = path.open("a", newline="", buffering=1)
        self._rows = csv.DictWriter(self._file, COLUMNS, restval="")
        if new:
            self._rows.writeheader()

    @contextmanager
    def part(self, what: str, **sizes: Any) -> Iterator[dict[str, Any]]:
        """Time a part, within others or not; what the block adds to the yielded row is written, too."""
        row: dict[str, Any] = {"node": self._node, "what": what, **sizes}
        begin = self._clock()
        yield row
        row["began_s"], row["took_s"] = f"{begin:.6f}", f"{self._clock() - begin:.6f}"
        self._rows.writerow(row)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RecordedExecutor(TorchExecutor):
    """A TorchExecutor whose runners record what they do."""

    def __init__(self, store: BlockStore, slot_tokens: int, timeline: Timeline) -> None:
        super().__init__(store, slot_tokens)
        self._timeline = timeline

    def runner(self, model: str, first_block: int, last_block: int, slots: int) -> Runner:
        """See Executor."""
        layers = len(self.layers(model, first_block, last_block))
        with self._timeline.part("make runner", layers=layers):
            blocks = range(first_block, last_block + 1)
            return RecordedRunner(self._store, model, blocks, slots, self._slot_tokens, self._kept, timeline=self._timeline)


class RecordedRunner(TorchRunner):
    """A TorchRunner that records its passes, the steps it prepares for replay, and KV that is read and written."""

    def __init__(self, *arguments: Any, timeline: Timeline) -> None:
        super().__init__(*arguments)
        self._timeline = timeline

    def run(self, work: wire.Pass, inputs: Sequence[int] | Hidden) -> list[int] | torch.Tensor:
        """See Runner. ``detail``: recorded, if this pass has prepared a replay; else the operators in use."""
        before = self._stage.recordings
        sizes = {"layers": len(self.layers), "decodes": work.decodes, "prefilled": work.prefill_tokens}
        with self._timeline.part("run", **sizes) as row:
            output = super().run(work, inputs)
            row["detail"] = "recorded" if self._stage.recordings > before else self._stage.operators
        return output

    def read_kv(self, slot: int, tokens: int, layers: range) -> torch.Tensor:
        """See Runner."""
        with self._timeline.part("read KV", layers=len(layers), prefilled=tokens):
            return super().read_kv(slot, tokens, layers)

    def write_kv(self, slot: int, layers: range, data: bytes | torch.Tensor) -> None:
        """See Runner."""
        with self._timeline.part("write KV", layers=len(layers)):
            super().write_kv(slot, layers, data)

    def close(self) -> None:
        """See Runner."""
        with self._timeline.part("close runner", layers=len(self.layers)):
            super().close()


class RecordedSwitching(Switching):
    """A Switching that records the parts of mode switches."""

    def __init__(self, *arguments: Any, timeline: Timeline) -> None:
        super().__init__(*arguments)
        self._timeline = timeline

    def switch(self, message: wire.Switch) -> None:
        """See Switching."""
        with self._timeline.part("switch", instance=message.command.pipeline, detail=message.command.kv):
            super().switch(message)

    def collect(self, pipeline: Instance, message: wire.Collect) -> None:
        """See Switching."""
        with self._timeline.part("send KV", instance=pipeline.number):
            super().collect(pipeline, message)

    def take_over(self, instance: Instance, message: wire.Handover) -> None:
        """See Switching."""
        with self._timeline.part("take over", instance=instance.number, detail=f"{len(message.tickets)} requests"):
            super().take_over(instance, message)

    def _kv_came(self, kv: KvData) -> None:
        with self._timeline.part("KV came", instance=kv.instance, layers=len(kv.layers), detail=f"request {kv.request_id}"):
            super()._kv_came(kv)


class RecordedCompute(Compute):
    """A Compute that records the parts of instances' lives, and its passes with what they hand on."""

    def __init__(self, *arguments: Any, timeline: Timeline) -> None:
        self._timeline = timeline  # first: the switching is made with it
        super().__init__(*arguments)

    def _new_switching(self, kv: MakeKv) -> Switching:
        parts = self._instances, self._ended, self._tell, self._report, self._offer, self._drop, kv
        return RecordedSwitching(*parts, timeline=self._timeline)

    def close(self) -> None:
        """See Compute."""
        super().close()
        self._timeline.close()

    def _start(self, command: Serve) -> None:
        with self._timeline.part("start", instance=command.instance, detail=f"{len(command.stages)} stages"):
            super()._start(command)

    def _begin(self, instance: Instance) -> None:
        with self._timeline.part("begin", instance=instance.number):
            super()._begin(instance)

    def _run_pass(self, instance: Instance, forward: wire.Forward) -> None:
        came = type(forward.inputs).__name__
        with self._timeline.part("pass", instance=instance.number, detail=f"batch {forward.batch} stage {forward.stage} {came}"):
            super()._run_pass(instance, forward)

    def _drop(self, number: int) -> None:
        with self._timeline.part("drop", instance=number):
            super()._drop(number)


def recorded(folder: str, node: NodeId, slot_tokens: int, store: BlockStore) -> tuple[Callable[..., Compute], TorchExecutor]:
    """Return a factory of a node's Compute and an executor, which both write to the node's timeline in ``folder``."""
    timeline = Timeline(Path(folder), node)
    return partial(RecordedCompute, timeline=timeline), RecordedExecutor(store, slot_tokens, timeline)
