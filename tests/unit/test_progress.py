"""Progress through many runs or seeds."""

from __future__ import annotations

import pytest

from lambdascale.experiments import progress


def test_the_remaining_time_is_that_of_runs_of_average_length() -> None:
    assert progress.times(60.0, 30, 90) == "0:01:00 so far, about 0:02:00 left"


def test_progress_without_a_terminal_is_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    with progress.JobProgress(4, "seeds") as shown:
        shown.advance(3)
        shown.advance()
    counts = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert counts == ["3 of 4 seeds", "4 of 4 seeds"]
