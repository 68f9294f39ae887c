"""The record of a served session: bounded, whole requests, and a run like any other once it is written."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from lambdascale.cli.main import main
from lambdascale.core import Failure, Request, Stage, UserError
from lambdascale.core.commands import AllocateNode, Dispatch, FailRequest, Serve, SetTimer
from lambdascale.core.events import NodeJoined, RequestArrived, RequestFinished, TimerFired, TokensProduced
from lambdascale.experiments.compose import compose
from lambdascale.experiments.runner import run, write_session
from lambdascale.metrics.session import SessionRecorder

MODEL = "llama2_7b"


def asked(number: int, at: float) -> RequestArrived:
    return RequestArrived(at, Request(number, at, MODEL, 10, 20))


def served(session: SessionRecorder, number: int, at: float) -> None:
    """Take a request through the session: five tokens, of which the first counts."""
    request = asked(number, at)
    session.on_event(request)
    session.on_command(at, Dispatch(1, (request.request,)))
    for token in range(5):
        session.on_event(TokensProduced(at + 0.1 * token, 1, number, 1, "local"))
    session.on_event(RequestFinished(at + 0.5, 1, number, 5))


def started(most: int) -> SessionRecorder:
    session = SessionRecorder(most)
    session.on_event(NodeJoined(0.0, 0))
    session.on_command(0.0, AllocateNode(0, MODEL, 1))
    session.on_command(0.0, Serve(1, MODEL, (Stage(0, 0, 0),), (1,), 100))
    return session


def kinds(session: SessionRecorder) -> list[str]:
    return [type(entry).__name__ for _, entry in session.recorder.entries]


def test_no_timers_and_one_token_of_each_request() -> None:
    """Memory grows with neither time nor the length of answers."""
    session = started(10)
    for at in range(1000):
        session.on_event(TimerFired(float(at), at))
        session.on_command(float(at), SetTimer(at, at + 1.0))
    served(session, 0, 2.0)
    assert kinds(session)[3:] == ["RequestArrived", "Dispatch", "TokensProduced", "RequestFinished"]


def test_the_first_requests_are_recorded_whole() -> None:
    session = started(2)
    session.on_event(asked(0, 1.0))
    served(session, 1, 1.5)
    served(session, 2, 2.0)  # one too many: none of its entries is kept
    session.on_command(2.6, Dispatch(1, (Request(0, 1.0, MODEL, 10, 20), Request(2, 2.0, MODEL, 10, 20))))
    session.on_command(2.7, AllocateNode(1, MODEL, 1))  # request 0 is still under way
    session.on_event(TokensProduced(3.0, 1, 0, 1, "local"))
    session.on_event(RequestFinished(3.0, 1, 0, 4))
    before = kinds(session)
    session.on_command(4.0, AllocateNode(2, MODEL, 1))
    session.on_event(NodeJoined(5.0, 3))
    session.on_command(6.0, FailRequest(2, Failure("no_node", "late")))
    assert kinds(session) == before
    assert (session.taken, session.left_out, session.recorder.end_s) == (2, 1, 3.0)
    dispatched = [entry for _, entry in session.recorder.entries if isinstance(entry, Dispatch)]
    assert [[request.request_id for request in each.requests] for each in dispatched] == [[1], [0]]


def test_entries_of_the_cluster_are_bounded_too() -> None:
    session = started(10)
    for node in range(1000):
        session.on_event(NodeJoined(1.0, node))
    assert len(session.recorder.entries) == 160
    session.on_event(asked(0, 1.0))
    assert session.left_out == 1


def config(folder: Path) -> list[str]:
    return [f"model={MODEL}", "cluster.nodes=2", f"out={folder}"]


def test_a_session_becomes_a_run(tmp_path: Path) -> None:
    """Requests under way at the end have failed; the run exports, and replays itself."""
    session = started(10)
    served(session, 0, 1.0)
    served(session, 1, 2.0)
    session.on_event(asked(2, 2.2))
    folder = tmp_path / "served"
    summary = write_session(compose(config(folder)), session, folder, started="now", wall_s=5.0)
    assert summary["requests"] == {"submitted": 3, "completed": 2, "failed": 1}
    assert summary["failures"] == {"stopping": 1}
    assert summary["ttft_s"]["p50"] == pytest.approx(0.0)
    assert main(["export", str(folder), "--format", "csv", "--out", str(tmp_path / "requests.csv")]) == 0
    assert len(pd.read_csv(tmp_path / "requests.csv")) == 3
    replay = run(
        compose([f"model={MODEL}", "cluster.nodes=2", "workload=run", f"workload.path={folder}", f"out={tmp_path / 're'}"])
    )
    assert replay.summary["requests"] == {"submitted": 3, "completed": 2, "failed": 1}


def test_nothing_served_is_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    with pytest.raises(UserError, match="no request was served"):
        write_session(compose(config(folder)), started(10), folder, started="now", wall_s=5.0)
    assert not folder.exists()


def test_the_command_looks_at_the_folder_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--record", str(tmp_path)]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["serve", "--record", str(tmp_path / "file" / "run")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert main(["serve", "--record-requests", "0"]) == 2
    assert "--record-requests must be at least 1" in capsys.readouterr().err
