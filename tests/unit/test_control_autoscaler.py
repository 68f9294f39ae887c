"""The one autoscaling policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lambdascale.control import Autoscaler

COUNTS = st.integers(0, 10_000)


@given(queued=COUNTS, running=COUNTS, target=st.integers(1, 64))
def test_enough_replicas_and_not_one_more(queued: int, running: int, target: int) -> None:
    desired = Autoscaler(target_per_replica=target, min_replicas=0).desired(queued, running)
    assert desired * target >= queued + running
    assert (desired - 1) * target < queued + running or desired == 0


@given(queued=COUNTS, running=COUNTS, low=st.integers(0, 5), more=st.integers(1, 5))
def test_within_bounds(queued: int, running: int, low: int, more: int) -> None:
    assert low <= Autoscaler(min_replicas=low, max_replicas=low + more).desired(queued, running) <= low + more


@pytest.mark.parametrize(
    "wrong", [{"target_per_replica": 0}, {"interval_s": 0.0}, {"keep_alive_s": -1.0}, {"min_replicas": 3, "max_replicas": 2}]
)
def test_nonsense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        Autoscaler(**wrong)
