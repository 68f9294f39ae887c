"""``lambdascale explore``: exit statuses and lines."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lambdascale.cli.main import main
from lambdascale.explore.explorer import Found, Tally
from lambdascale.explore.scenario import draw
from tests.explore.planted import PLANTED


def test_nothing_found_is_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "--seeds", "0:10", "--system", "serverlessllm"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("10 seeds (1 systems)")
    assert out.endswith("0 found\n")


def test_a_finding_is_status_1_and_its_command_replays_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    PLANTED["an_allocation_lives_on_without_its_node"](monkeypatch)
    assert main(["explore", "--seeds", "0:3"]) == 1
    lines = capsys.readouterr().out.splitlines()
    command = next(line for line in lines if "--faults" in line).split()
    assert command[:2] == ["lambdascale", "explore"]
    assert main(command[1:]) == 1
    replayed = capsys.readouterr().out.splitlines()
    assert "does not hold" in replayed[-1]
    assert any("** node" in line for line in replayed)


def test_a_replay_that_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "--seeds", "1", "--faults", "none"]) == 0
    assert capsys.readouterr().out.endswith("every invariant holds\n")


def test_a_row_of_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row counts what was found, too: lost and doubled requests have columns of their own."""
    assert main(["explore", "--seeds", "0:10", "--system", "serverlessllm", "--out", str(tmp_path / "tables")]) == 0
    PLANTED["a_lost_nodes_requests_are_forgotten"](monkeypatch)
    assert main(["explore", "--seeds", "0:10", "--out", str(tmp_path / "tables")]) == 1
    with (tmp_path / "tables" / "reliability.csv").open() as file:
        clean, broken = csv.DictReader(file)
    requests = sum(len(draw(seed, "serverlessllm").requests) for seed in range(10))
    assert clean["tried"] == "10 seeds"
    assert (clean["requests"], clean["lost"], clean["doubled"], clean["wrong"]) == (str(requests), "0", "0", "0")
    assert clean["command"] == "lambdascale explore --seeds 0:10 --system serverlessllm --jobs 1"
    assert clean["detail"].endswith("nothing found")
    assert int(broken["lost"]) + int(broken["wrong"]) > 0


def test_lost_and_doubled_requests_are_told_apart() -> None:
    broken = ("none lost", "none lost", "finished once", "tokens")
    row = Tally(found=[Found(0, "lambdascale", name, "", ()) for name in broken]).row("", None)
    assert (row.lost, row.doubled, row.wrong) == (2, 1, 1)
    assert row.detail.endswith("1 finished once, 2 none lost, 1 tokens")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seeds", "a:b"], "--seeds takes A:B or one seed, not a:b"),
        (["--seeds", "-1:2"], "not -1:2"),
        (["--seeds", "5:5"], "names no seed"),
        (["--seeds", "0:2", "--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--seeds", "0:2", "--system", "nobody"], "nobody"),
        (["--seeds", "0:2", "--faults", "all"], "replays one seed, not 2"),
        (["--seeds", "0", "--faults", "x"], "not x"),
        (["--seeds", "0", "--faults", "none", "--out", "nowhere"], "leave --faults out"),
        (["--seeds", "0", "--faults", "99"], "faults, counted from 0"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"{arguments[0]}={arguments[1]}", *arguments[2:]]
    assert main(["explore", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
