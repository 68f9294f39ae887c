"""``lambdascale plan``: its JSON, which other programs read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lambdascale.cli.main import main
from lambdascale.experiments.compose import conf_dir
from lambdascale.explore.scenario import preset


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["plan", *arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def test_a_system_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "mine.yaml"
    given.write_text((conf_dir() / "system" / "faasnet.yaml").read_text())
    settings = ("--destinations", "5", "--blocks", "3")
    assert plan(capsys, "--system", str(given), *settings) == plan(capsys, "--system", "faasnet", *settings)
    assert preset(str(given)) == preset("faasnet")


@pytest.mark.parametrize("system", ["lambdascale", "faasnet", "nccl_broadcast"])
def test_document(system: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = plan(capsys, "--system", system, "--sources", "1", "--destinations", "7", "--blocks", "4")
    assert list(document) == ["nodes", "sources", "blocks", "rounds", "pipelines"]
    assert (document["nodes"], document["sources"], document["blocks"]) == (8, [0], 4)
    held = {0: set(range(4))}
    for sends in document["rounds"]:
        before = {node: set(blocks) for node, blocks in held.items()}
        for transfer in sends:
            assert set(transfer) == {"src", "dst", "block"}
            assert transfer["block"] in before[transfer["src"]]
            held.setdefault(transfer["dst"], set()).add(transfer["block"])
    assert held == {node: set(range(4)) for node in range(8)}
    assert bool(document["pipelines"]) == (system == "lambdascale")


def test_pipelines_hold_their_stages_when_ready(capsys: pytest.CaptureFixture[str]) -> None:
    document = plan(capsys, "--sources", "2", "--destinations", "6", "--blocks", "16")
    rounds = document["rounds"]
    for pipeline in document["pipelines"]:
        arrived = {(t["dst"], t["block"]) for sends in rounds[: pipeline["ready_round"]] for t in sends}
        covered = []
        for stage in pipeline["stages"]:
            blocks = range(stage["first_block"], stage["last_block"] + 1)
            assert all((stage["node"], block) in arrived for block in blocks)
            covered += blocks
        assert covered == list(range(16))


def test_a_readable_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--destinations", "3", "--blocks", "2"]) == 0
    shown = capsys.readouterr().out
    assert "3 rounds" in shown
    assert "0>1:0" in shown
