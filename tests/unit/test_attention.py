"""The clock that stands still while the controller is stopped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lambdascale.live.controller.attention import LOOK_S, AttendedTime


@given(steps=st.lists(st.floats(0.0, 1.9) | st.floats(2.1, 60.0), max_size=30))
def test_a_pause_does_not_count(steps: list[float]) -> None:
    now = 5.0
    attended = AttendedTime(lambda: now)
    begin = before = attended()
    for step in steps:
        now += step
        assert attended() >= before
        before = attended()
    expected = sum(step for step in steps if step <= 2 * LOOK_S)
    assert before - begin == pytest.approx(expected, abs=1e-6)
