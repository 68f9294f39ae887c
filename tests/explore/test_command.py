"""``lambdascale explore``: exit statuses and lines."""

from __future__ import annotations

import pytest

from lambdascale.cli.main import main
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
        (["--seeds", "0", "--faults", "99"], "faults, counted from 0"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"{arguments[0]}={arguments[1]}", *arguments[2:]]
    assert main(["explore", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
