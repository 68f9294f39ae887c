"""A worker's thread: spare time, and what ends it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from lambdascale.live.node.worker import NO_INSTANCE, Worker

LIMIT_S = 30


def test_spare_time_is_used_until_nothing_is_left_and_again_after_a_job() -> None:
    calls: queue.SimpleQueue[str] = queue.SimpleQueue()
    left = [2]

    def spare(urgent: Callable[[], bool]) -> bool:
        left[0] -= 1
        calls.put("spare")
        return left[0] > 0

    worker = Worker("w", lambda: False, lambda: None, lambda error, instance: None, spare)
    worker.start()
    for _ in range(2):
        assert calls.get(timeout=LIMIT_S) == "spare"
    worker.post(lambda: calls.put("job")).result(LIMIT_S)
    assert [calls.get(timeout=LIMIT_S) for _ in range(2)] == ["job", "spare"]
    worker.post(lambda: calls.put("job")).result(LIMIT_S)
    worker.close()
    found = [calls.get_nowait() for _ in range(calls.qsize())]
    assert found in (["job"], ["job", "spare"]), "once after each job, and not without one"


def test_work_for_spare_time_hears_of_a_job_while_it_runs() -> None:
    begun, jobs_wait = threading.Event(), threading.Event()
    heard: list[bool] = []

    def spare(urgent: Callable[[], bool]) -> bool:
        heard.append(urgent())
        begun.set()
        assert jobs_wait.wait(LIMIT_S)
        heard.append(urgent())
        return False

    worker = Worker("w", lambda: False, lambda: None, lambda error, instance: None, spare)
    worker.start()
    assert begun.wait(LIMIT_S)
    job = worker.post(lambda: None)
    jobs_wait.set()
    job.result(LIMIT_S)
    assert heard[:2] == [False, True]
    worker.close()


def test_turns_come_first() -> None:
    order: list[str] = []
    ended = threading.Event()

    def turn() -> None:
        order.append("turn")

    def spare(urgent: Callable[[], bool]) -> bool:
        order.append("spare")
        ended.set()
        return False

    worker = Worker("w", lambda: len(order) < 3, turn, lambda error, instance: None, spare)
    worker.start()
    assert ended.wait(LIMIT_S)
    worker.close()
    assert order[:4] == ["turn"] * 3 + ["spare"]


def test_what_spare_work_raises_is_reported_and_the_thread_goes_on() -> None:
    failures: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()

    def spare(urgent: Callable[[], bool]) -> bool:
        raise ValueError("no memory")

    worker = Worker("w", lambda: False, lambda: None, lambda error, instance: failures.put((str(error), instance)), spare)
    worker.start()
    assert failures.get(timeout=LIMIT_S) == ("no memory", NO_INSTANCE)
    worker.post(lambda: None).result(LIMIT_S)
    worker.close()
