"""Some thousand mutated messages at everything that takes bytes of others, and what the attack itself finds."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import messages
from tests.fuzz.messages import attack, bounded, main
from tests.fuzz.mutations import Mutator, of_bytes, of_json, of_msgpack
from tests.fuzz.strangers import Frames
from tests.fuzz.surfaces import BATCH, Controller


def test_some_thousand_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--count", "4000", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "reliability.csv").read_text().splitlines()))
    assert [row["what"].removeprefix("mutated messages, ") for row in rows] == [
        *("controller", "agent", "peers", "frames", "handshakes", "HTTP bodies", "HTTP requests")
    ]
    assert sum(int(row["tried"].split()[0]) for row in rows) == 4000
    assert {row["wrong"] for row in rows} == {"0"}
    taken = {row["what"]: int(row["detail"].split()[0]) for row in rows}
    assert not taken.pop("mutated messages, handshakes"), "no stranger gets in"
    assert all(taken.values()), "some are still messages: what follows from them is tried as well"


class Odd:
    """A surface with a fault of its own."""

    name = "odd"

    def __init__(self, fault: str) -> None:
        self.corpus = [b"abcdefgh"]
        self.begun = 0
        self._fault = fault

    def mutator(self, rng: Random) -> Mutator:
        return of_bytes(rng)

    def begin(self) -> None:
        self.begun += 1

    def attempt(self, data: bytes) -> bool:
        if b"\xff" in data:
            if self._fault == "raises":
                raise KeyError("lost")
            if self._fault == "hangs":
                time.sleep(60)
            if self._fault == "allocates":
                bytearray(4 << 30)
        return data == self.corpus[0]

    def end(self) -> None: ...


@pytest.mark.parametrize(("fault", "told"), [("raises", "KeyError: 'lost'"), ("hangs", "Hang"), ("allocates", "MemoryError")])
def test_what_is_a_failure(fault: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PATIENCE_S", 0.2)
    surface = Odd(fault)
    with bounded():
        tally = attack(surface, 0, range(3 if fault == "hangs" else 100))
        while not tally.failures:
            tally = attack(surface, tally.tried, range(20))
    _, what, data = tally.failures[0]
    assert what.startswith(told)
    assert b"\xff" in data
    assert surface.begun > len(tally.failures), "it starts anew after each"


def test_a_message_has_the_same_bytes_in_a_part_of_the_run() -> None:
    surface = Frames()
    whole = dict(messages.mutants(surface, 3, range(200)))
    assert dict(messages.mutants(surface, 3, range(150, 200))) == {number: whole[number] for number in range(150, 200)}
    assert len(set(whole.values())) > 100


def test_a_surface_that_valid_messages_no_longer_reach_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    surface = Controller()

    def end() -> None:
        raise AssertionError("the controller answers nobody")

    monkeypatch.setattr(surface, "end", end)
    tally = attack(surface, 0, range(2 * BATCH))
    assert [what.split(" (")[0] for _, what, _ in tally.failures] == ["AssertionError: the controller answers nobody"] * 2


@pytest.mark.parametrize("make", [of_msgpack, of_json, of_bytes])
def test_changes_of_every_kind(make: Callable[[Random], Mutator]) -> None:
    """Shorter, longer and as long; with parts of the other message."""
    mutate = make(Random(1))
    first, second = (b'{"a": [1, "b"]}', b'{"zz": 7}') if make is of_json else (b"\x82\xa1a\x01\xa1b\xa1c", b"\x81\xa2zz\x07")
    made = [mutate(first, second) for _ in range(300)]
    lengths = {(len(each) > len(first)) - (len(each) < len(first)) for each in made}
    assert lengths == {-1, 0, 1}
    assert any(b"zz" in each for each in made)
    assert len(set(made)) > 150


def test_a_surface_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--only", "nothing"])
    assert ended.value.code == 2
    assert "--only names no surface: nothing" in capsys.readouterr().err
