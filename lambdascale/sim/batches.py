"""Batches in flight of simulated instances, and the compute ports' view of them: runs of a replica, or stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lambdascale.control.batching import BatchLimits, BatchScheduler, Iteration
from lambdascale.core import NodeId, Stage
from lambdascale.core.events import Mode, RequestFinished, RequestPreempted, TokensProduced
from lambdascale.core.timing import ComputeModel
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.port import ComputePort

if TYPE_CHECKING:
    from lambdascale.sim.instances import SimInstance

_NO_ITERATION = Iteration([], 0, 0, 1)
NOWHERE: frozenset[NodeId] = frozenset()
Emit = Callable[[TokensProduced | RequestFinished | RequestPreempted], None]
# Bytes of KV from one node to another, and what to call once they have arrived.
CopyKv = Callable[[NodeId, NodeId, float, Callable[[], None]], None]


@dataclass(slots=True, kw_only=True)
class Surroundings:
    """The cluster as the instances of a model see it. ``timing``: the compute model of each node for the model.

    ``batches``: batches in flight for each node, one for each GPU that holds layers of the model. ``replicas``: the layouts of
    one stage asked for so far; a layout is never changed, and neither are the ports and compute models of nodes.
    """

    kernel: Kernel
    port: Callable[[NodeId], ComputePort]
    timing: Callable[[NodeId], ComputeModel]
    emit: Emit
    copy_kv: CopyKv
    limits: BatchLimits
    batches: int
    kv_bytes_per_token: int
    hop_s: float
    block_bytes: tuple[int, ...]
    replicas: dict[Stage, Layout] = field(default_factory=dict)

    def layout(self, stages: tuple[Stage, ...]) -> Layout:
        """Return the layout of a new instance's ``stages``."""
        if len(stages) > 1:
            return Layout(stages, self)
        layout = self.replicas.get(stages[0])
        if layout is None:
            layout = self.replicas[stages[0]] = Layout(stages, self)
        return layout


class Layout:
    """Stages with what an iteration needs at each of them: the node's port and compute model, and the stage's share.

    ``port`` and ``timing`` are the first stage's.
    """

    __slots__ = ("mode", "nodes", "port", "ports", "shares", "single", "stages", "timing", "timings")

    def __init__(self, stages: tuple[Stage, ...], around: Surroundings) -> None:
        total = sum(around.block_bytes)
        self.stages = stages
        self.single = len(stages) == 1
        self.nodes = tuple(dict.fromkeys(stage.node for stage in stages))
        self.ports = [around.port(stage.node) for stage in stages]
        self.timings = [around.timing(stage.node) for stage in stages]
        self.port, self.timing = self.ports[0], self.timings[0]
        self.shares = [sum(around.block_bytes[stage.first_block : stage.last_block + 1]) / total for stage in stages]
        self.mode: Mode = "local" if self.single else "pipeline"


class Batch:
    """A batch in flight, and what occupies the port of a replica while one of its iterations is under way (see Run).

    ``under_way``: the layout its iteration runs on, None between iterations. ``on``: the one with its KV. ``blocked``: KV is
    moving, from ``sources``. ``timing``: the replica's compute model. A decode batch runs ``iteration`` ``steps`` times.
    ``stages``: what occupies the ports of a pipeline instead, from its first iteration on.
    """

    __slots__ = (
        "_instance",
        "_pace",
        "blocked",
        "iteration",
        "on",
        "scheduler",
        "sources",
        "stages",
        "steps",
        "timing",
        "under_way",
    )

    fixed = False

    def __init__(self, instance: SimInstance, scheduler: BatchScheduler, on: Layout) -> None:
        self.scheduler = scheduler
        self.on = on
        self.under_way: Layout | None = None
        self.blocked = False
        self.sources = NOWHERE
        self.iteration = _NO_ITERATION
        self.steps = 1
        self.timing = on.timing
        self.stages: Stages | None = None
        self._instance = instance
        self._pace = 1.0

    @property
    def is_due(self) -> bool:
        """True if the next iteration could begin."""
        return self.under_way is None and not self.blocked and len(self.scheduler) > 0

    def begin(self, pace: float) -> float:
        """See Run."""
        iteration, self._pace = self.iteration, pace
        if iteration.prefills:
            return pace * self.timing.iteration_s(iteration)
        return pace * self.timing.decode_run_s(iteration.decodes, iteration.context_tokens, self.steps)

    def last_s(self) -> float:
        """See Run."""
        iteration = self.iteration
        if self.steps == 1:
            return self._pace * self.timing.iteration_s(iteration)
        context = iteration.context_tokens + iteration.decodes * (self.steps - 1)
        return self._pace * self.timing.decode_run_s(iteration.decodes, context, 1)

    def cut(self, elapsed_s: float) -> float | None:
        """See Run."""
        if self.steps <= 1:
            return None
        iteration = self.iteration
        steps, run_s = self.timing.decode_steps_by(iteration.decodes, iteration.context_tokens, elapsed_s / self._pace)
        if steps >= self.steps:
            return None
        self.steps = steps
        return self._pace * run_s

    def end(self) -> None:
        """Take note that the iteration is over, and look for the next one."""
        instance = self._instance
        first, finished = self.scheduler.complete(self.iteration, self.steps)
        if first or finished:
            instance.report(self, first, finished)
        self.under_way = None
        layout = instance.layout
        if self.on is not layout:
            instance.move(self)
        layout.port.resume(instance)

    def end_at(self, end_s: float) -> None:
        """See Run."""
        raise AssertionError("a replica's run is not fixed")

    def lose(self, elapsed_s: float) -> None:
        """Keep the iterations of a drained run that are over; the one under way is lost."""
        iteration = self.iteration
        if iteration.prefills:
            return
        steps, _ = self.timing.decode_steps_by(iteration.decodes, iteration.context_tokens, elapsed_s / self._pace)
        done = min(steps, self.steps) - 1
        if done:
            self._instance.report(self, *self.scheduler.complete(iteration, done))


class Stages:
    """A pipeline's batch at stage ``position``: it occupies one port after another (see Run)."""

    __slots__ = ("_batch", "_hop_s", "_instance", "_kernel", "_lasts_s", "position")

    fixed = True

    def __init__(self, instance: SimInstance, batch: Batch) -> None:
        self._instance = instance
        self._batch = batch
        self._kernel = instance.kernel
        self._hop_s = instance.hop_s
        self._lasts_s = 0.0
        self.position = 0

    def begin(self, pace: float) -> float:
        """See Run."""
        batch, position = self._batch, self.position
        layout = batch.under_way
        assert layout is not None, "an iteration is under way"
        self._lasts_s = lasts = pace * layout.timings[position].iteration_s(batch.iteration, layout.shares[position])
        return lasts

    def last_s(self) -> float:
        """See Run."""
        return self._lasts_s

    def cut(self, elapsed_s: float) -> None:
        """See Run."""

    def end(self) -> None:
        """See Run."""
        self.end_at(self._kernel.now)

    def end_at(self, end_s: float) -> None:
        """Hand the iteration to the next stage, or its tokens back to the first, the hop's latency after ``end_s`` (see Run)."""
        self._kernel.at(end_s + self._hop_s, self.go_on)

    def lose(self, elapsed_s: float) -> None:
        """Lose the iteration."""

    def go_on(self, _: object) -> None:
        """Queue at the next stage, or end where the tokens are back at the first."""
        layout = self._batch.under_way
        if layout is None or self._instance.stopped:
            return
        self.position += 1
        if self.position < len(layout.ports):
            layout.ports[self.position].add_pass(self._instance, self)
        else:
            self._batch.end()
