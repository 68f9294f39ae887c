"""Messages that no honest node sends, to the controller: nodes with the key that are broken, or stopped for a long time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lambdascale.control import ControlPlane, build_system
from lambdascale.core.commands import LoadBlocks, PlaceCopy
from lambdascale.core.events import BlockArrived, CommandFailed, SetUpDone
from lambdascale.live import wire
from lambdascale.testing.systems import small_cluster, small_model
from tests.live.harness import system_of
from tests.unit.live_backend_rig import Rig

SYSTEM = system_of("lambdascale")
SMALL = st.integers(-2, 12) | st.sampled_from([-(1 << 63), 1 << 40, (1 << 63) - 1])
# A terminal's commands, lines that the controller has not written, text that runs backwards, and very much of it.
NAMES = st.sampled_from(["m", "other", "", "\x1b]0;\a\x1b[2J", "cut\nFORGED", "\u202e\x00\x7f", "x y " * 50_000])
TOKEN = st.builds(wire.Token, SMALL, SMALL, SMALL, st.booleans())
EVENT = st.one_of(
    st.builds(BlockArrived, st.just(0.0), SMALL, SMALL, NAMES, SMALL),
    st.builds(SetUpDone, st.just(0.0), SMALL, SMALL),
    st.builds(CommandFailed, st.just(0.0), NAMES, NAMES, SMALL, SMALL, NAMES),
)
MESSAGE = st.one_of(
    st.builds(wire.Hello, SMALL, st.just("127.0.0.1:5"), SMALL, st.dictionaries(NAMES, st.floats(), max_size=2)),
    st.builds(wire.Connected, SMALL, SMALL),
    st.builds(wire.Happened, EVENT),
    st.builds(wire.Placed, SMALL, NAMES),
    st.builds(wire.Tokens, SMALL, st.sampled_from(["local", "pipeline"]), st.tuples(TOKEN) | st.tuples(TOKEN, TOKEN)),
    st.builds(wire.Aborted, SMALL, SMALL),
    st.builds(wire.Resumed, SMALL, st.dictionaries(SMALL, st.tuples(SMALL, SMALL), max_size=2)),
    st.builds(wire.Severed, SMALL, NAMES),
    st.builds(wire.Unreached, SMALL, NAMES),
    st.just(wire.Beat()),
    st.builds(wire.Fault, SMALL, NAMES, st.booleans()),
)
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(said=st.lists(st.tuples(st.integers(0, 2), MESSAGE), max_size=12))
def test_no_message_of_a_node_ends_the_controller(said: list[tuple[int, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """The controller goes on and takes the next request, before and while the model is loaded and with a request waiting.

    What it prints, and tells clients, are short lines of printable characters, whatever nodes say.
    """
    capsys.readouterr()
    rig = Rig(nodes=3, restarts=3)
    plane = build_system(SYSTEM, cluster=small_cluster(nodes=3), models=[small_model("m")])
    play(rig, plane)
    first = rig.offer(1)
    play(rig, plane)
    for node, message in said:
        rig.say(node, wire.to_controller(wire.encode(message)))
        play(rig, plane)
    second = rig.offer(2)
    play(rig, plane)
    rig.backend.close()
    printed = capsys.readouterr().err
    lines = printed.removesuffix("\n").split("\n") if printed else []
    lines += [failure.text for sink in (first, second) for failure in sink.failures]
    assert all(line.isprintable() and len(line) < 1000 and not line.startswith("FORGED") for line in lines), lines


def play(rig: Rig, plane: ControlPlane) -> None:
    """Let everything happen; what is to be loaded arrives at once."""
    while events := rig.events():
        for event in events:
            for command in plane.on_event(event):
                rig.backend.submit(command)
                if isinstance(command, LoadBlocks):
                    for block in command.blocks:
                        arrived = BlockArrived(0.0, command.transfer_id, command.node, command.model, block)
                        rig.say(command.node, wire.Happened(arrived))
                elif isinstance(command, PlaceCopy):
                    rig.say(command.node, wire.Placed(command.node, command.model))


def mutations(data: bytes) -> st.SearchStrategy[bytes]:
    """Some bytes changed, dropped or added."""
    at = st.integers(0, len(data))
    return st.tuples(at, at, st.binary(max_size=6)).map(lambda m: data[: m[0]] + m[2] + data[m[1] :])


@FUZZ
@given(MESSAGE.map(wire.encode).flatmap(mutations))
def test_mutated_bytes_are_a_message_or_refused(data: bytes) -> None:
    """Nothing but the one error, whichever end it was meant for."""
    for decode in (wire.to_controller, wire.to_agent, wire.to_peer):
        try:
            decode(data)
        except wire.Garbled:
            continue


@pytest.mark.parametrize("level", [b"\x91", b"\x81\xa1a"], ids=["arrays", "maps"])
def test_a_field_that_nobody_knows_may_be_nested_without_end(level: bytes) -> None:
    """The thread of the controller lives on: msgspec's own error for such a message is a RecursionError."""
    message = wire.encode(wire.Placed(1, "m"))
    assert message[0] == 0x83, "a map of three"
    with pytest.raises(wire.Garbled):
        wire.to_controller(b"\x84" + message[1:] + b"\xa1x" + level * 100_000 + b"\x00")
