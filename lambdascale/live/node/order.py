"""The order of a node's commands: those of one model that depend on each other's memory are carried out one after another."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from lambdascale.live.node.jobs import About, Job


@dataclass(frozen=True)
class _Waiting:
    about: About
    job: Job
    ready: Callable[[], bool]


def _always() -> bool:
    return True


class Order:
    """Queues of commands by model. A command begins when the model is not held, its own condition is true, and none waits before
    it.

    Hold a model while a command is changing where the model's blocks lie (a release, an eviction, a copy to host memory, the end
    of a cancelled load): a command that came later finds its memory as the controller believes it to be. For one thread.
    ``failed(about, error)`` is told of a waiting command that raises when its turn comes.
    """

    def __init__(self, failed: Callable[[About, Exception], None]) -> None:
        self._failed = failed
        self._held: Counter[str] = Counter()
        self._queues: dict[str, deque[_Waiting]] = {}

    def submit(self, model: str, about: About, job: Job, ready: Callable[[], bool] = _always) -> None:
        """Carry a command out, now or when it may begin. ``ready``: its own condition, besides those of the model."""
        self._queues.setdefault(model, deque()).append(_Waiting(about, job, ready))
        self.retry(model)

    def cancel(self, transfer_id: int) -> None:
        """Drop a transfer's command if it still waits."""
        for model, queue in list(self._queues.items()):
            self._queues[model] = deque(each for each in queue if each.about.transfer_id != transfer_id)
            self.retry(model)

    def hold(self, model: str) -> None:
        """Let no command of the model begin until ``let_go`` has been called as often."""
        self._held[model] += 1

    def let_go(self, model: str) -> None:
        """Undo one ``hold``."""
        self._held[model] -= 1
        self._held += Counter()  # drops zeros
        self.retry(model)

    def retry(self, model: str) -> None:
        """Begin the model's waiting commands as far as they may: call it when a condition may have become true."""
        queue = self._queues.get(model, deque())
        while queue and not self._held[model] and queue[0].ready():
            waiting = queue.popleft()
            try:
                waiting.job()
            except Exception as error:
                self._failed(waiting.about, error)
            queue = self._queues.get(model, deque())
        if not queue:
            self._queues.pop(model, None)
