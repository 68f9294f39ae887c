"""Iterations over padded, static input: the path of CUDA graphs, computed anew at every call on a CPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from lambdascale.checkpoints import HfCheckpoint
from lambdascale.control import BatchLimits
from lambdascale.inference import Engine, Sampling, Segment, StageBatch, Ticket, TransformerStage, load_blocks
from lambdascale.inference.choosing import choose
from lambdascale.inference.forms import Form, form_of, usual_forms
from lambdascale.inference.replay import Abandoned, Replay
from lambdascale.inference.scratch import Scratch

from .conftest import VARIANTS, Answer
from .test_token_exactness import SLOT_TOKENS, TOKENS, prompts, run, tickets


def stage(directory: Path, slots: int = 8, *, replays: bool = True) -> TransformerStage:
    source = HfCheckpoint(directory)
    return TransformerStage(source.architecture, load_blocks(source, 1), slots, SLOT_TOKENS, replays=replays)


def decode(slots: dict[int, int], wanted: tuple[int, ...] | None = None) -> StageBatch:
    """A token each for slots at positions."""
    segments = tuple(Segment(slot, position, 1) for slot, position in slots.items())
    return StageBatch(segments, len(segments), tuple(range(len(segments))) if wanted is None else wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_transformers(variant: str, models: Callable[[str], Path], answers: Answer) -> None:
    """Every architecture, over two stages, with batches of every size on the way."""
    asked = prompts(12)
    wanted = answers(models(variant), asked, TOKENS)
    source = HfCheckpoint(models(variant))
    blocks = load_blocks(source, 2)
    stages = [TransformerStage(source.architecture, [block], 5, SLOT_TOKENS, replays=True) for block in blocks]
    running = Engine(stages, BatchLimits(max_batch=5, max_tokens=64))
    sent: list[Ticket] = tickets(asked)
    for ticket in sent:
        running.add(ticket)
    run(running)
    assert [ticket.output for ticket in sent] == wanted


def test_padding_changes_nothing(models: Callable[[str], Path]) -> None:
    """Padding changes no logits of others and no KV, that of slot 0 included, to which it points."""
    padded, plain = stage(models("llama")), stage(models("llama"), replays=False)
    for each in (padded, plain):
        each.kv.both.normal_(generator=torch.Generator().manual_seed(3))
    batch, ids = decode({1: 9, 4: 0, 7: 100}), torch.tensor([3, 5, 7])
    torch.testing.assert_close(padded.run(batch, ids), plain.run(batch, ids), rtol=0, atol=1e-4)
    torch.testing.assert_close(padded.kv.both, plain.kv.both, rtol=0, atol=1e-5)
    assert torch.equal(padded.kv.both[:, 0], plain.kv.both[:, 0])


def test_an_earlier_batchs_rows_are_no_longer_there(models: Callable[[str], Path]) -> None:
    """Four rows, then three in the same memory: the fourth slot's KV stays as it is."""
    padded = stage(models("llama"))
    padded.run(decode(dict.fromkeys(range(4), 5)), torch.arange(4))
    before = padded.kv.both.clone()
    padded.run(decode({0: 5, 1: 6, 2: 7}), torch.tensor([9, 9, 9]))
    assert torch.equal(padded.kv.both[:, 3], before[:, 3])
    assert not torch.equal(padded.kv.both[:, 0], before[:, 0])


def test_results_outlive_the_next_step(models: Callable[[str], Path]) -> None:
    padded = stage(models("llama"))
    first = padded.run(decode({0: 0}), torch.tensor([1]))
    kept = first.clone()
    padded.run(decode({0: 1}), torch.tensor([2]))
    assert torch.equal(first, kept)


def test_a_dropped_stage_is_freed_at_once(models: Callable[[str], Path]) -> None:
    """KV memory does not wait for garbage collection."""
    padded = stage(models("llama"))
    padded.run(decode({0: 0}), torch.tensor([1]))
    dropped = weakref.ref(padded)
    gc.disable()
    try:
        del padded
        assert dropped() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("wanted", [(0, 1, 2), (1,), (2, 0), ()])
def test_logits_only_of_wanted_rows(wanted: tuple[int, ...], models: Callable[[str], Path]) -> None:
    padded, plain = stage(models("llama")), stage(models("llama"), replays=False)
    batch, everything = decode({0: 0, 1: 0, 2: 0}, wanted), decode({0: 0, 1: 0, 2: 0})
    ids = torch.tensor([10, 20, 30])
    torch.testing.assert_close(padded.run(batch, ids), plain.run(everything, ids)[list(wanted)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama", "llama_head_dim", "qwen2", "mistral"])
@pytest.mark.parametrize("decodes", [{}, {1: 9}, {1: 9, 4: 0, 7: 100}])
@pytest.mark.parametrize("tokens", [1, 16, 70])
def test_prompts_beside_decodes(tokens: int, decodes: dict[int, int], variant: str, models: Callable[[str], Path]) -> None:
    """The same logits and KV as without padding; mistral's window of 17 tokens admits short prompts only."""
    padded, plain = stage(models(variant)), stage(models(variant), replays=False)
    for each in (padded, plain):
        each.kv.both.normal_(generator=torch.Generator().manual_seed(3))
    rows = tokens + len(decodes)
    segments = (Segment(2, 0, tokens), *decode(decodes).segments)
    batch = StageBatch(segments, len(decodes), tuple(range(tokens - 1, rows)))
    padded.prepare(usual_forms(8, padded._most_replayed))
    before = padded.recordings
    ids = torch.arange(rows) % 200
    torch.testing.assert_close(padded.run(batch, ids), plain.run(batch, ids), rtol=0, atol=1e-4)
    torch.testing.assert_close(padded.kv.both, plain.kv.both, rtol=0, atol=1e-5)
    assert torch.equal(padded.kv.both[:, 0], plain.kv.both[:, 0])
    assert padded.recordings == before
    assert (form_of(batch, padded._most_replayed) is not None) == (rows <= 17 or variant != "mistral")


def test_a_shorter_prompt_after_a_longer_one(models: Callable[[str], Path]) -> None:
    """Nothing of what was in the same memory before counts, and no KV is written for it."""
    padded, plain = stage(models("llama")), stage(models("llama"), replays=False)
    padded.prepare([Form(64, True)])
    for tokens, slot in ((60, 1), (5, 3)):
        batch, ids = StageBatch((Segment(slot, 0, tokens),), 0, (tokens - 1,)), torch.arange(tokens)
        torch.testing.assert_close(padded.run(batch, ids), plain.run(batch, ids), rtol=0, atol=1e-4)
    torch.testing.assert_close(padded.kv.both, plain.kv.both, rtol=0, atol=1e-5)
    assert not padded.kv.both[:, 3, :, 5:].any()


@pytest.mark.parametrize("wanted", [(), (4,), (5, 6), (6,), (6, 4)])
def test_answers_of_wanted_rows(wanted: tuple[int, ...], models: Callable[[str], Path]) -> None:
    """Greedy tokens come from the replay itself, drawn ones from its logits."""
    padded, plain = stage(models("llama")), stage(models("llama"), replays=False)
    batch = StageBatch((Segment(0, 0, 5), Segment(1, 0, 1), Segment(2, 0, 1)), 2, wanted)
    padded.prepare([Form(64, True, 8)])
    ids, places = torch.arange(7), list(range(len(wanted)))
    rules = [Sampling(temperature=1.0, seed=3) if place % 2 else Sampling() for place in places]
    expected = choose(plain.run(batch, ids), rules, places)
    assert padded.answer(batch, ids, rules, places) == expected
    assert plain.answer(batch, ids, rules, places) == expected


def test_recording_ahead_ends(models: Callable[[str], Path]) -> None:
    """Every usual form once, in order; a stage that replays nothing has nothing to record."""
    padded = stage(models("llama"))
    forms = list(usual_forms(8, 1024))
    for form in forms:
        assert padded._replays is not None
        assert not padded._replays.has(form)
        assert padded.record_next(lambda: False)
        assert padded._replays.has(form)
    assert not padded.record_next(lambda: False)
    assert padded.recordings == len(forms)
    assert not stage(models("llama"), replays=False).record_next(lambda: False)


def test_a_prompts_form_is_recorded_under_load_once_it_pays(models: Callable[[str], Path]) -> None:
    """36 ms for a recording, 4 ms for each use without. Both ways give the same logits and KV; decodes are recorded at once."""
    padded, plain = stage(models("llama")), stage(models("llama"), replays=False)
    batch, ids = StageBatch((Segment(2, 0, 40), Segment(5, 3, 1)), 1, (39, 40)), torch.arange(41)
    recordings = []
    for _ in range(11):
        torch.testing.assert_close(padded.run(batch, ids), plain.run(batch, ids), rtol=0, atol=1e-4)
        recordings.append(padded.recordings)
    assert recordings == [0] * 9 + [1, 1]
    torch.testing.assert_close(padded.kv.both, plain.kv.both, rtol=0, atol=1e-5)
    padded.run(decode({0: 0}), torch.tensor([1]))
    assert padded.recordings == 2


def test_spare_time_records_decodes_first_then_what_was_missed_most(models: Callable[[str], Path]) -> None:
    """One of the missed forms is not usual: a prompt beside 16 decodes."""
    padded = stage(models("llama"), 24)
    assert padded._replays is not None
    alone, beside, unusual = Form(128, True), Form(64, True, 8), Form(64, True, 16)
    for form, uses in ((alone, 2), (unusual, 4), (beside, 3), (Form(256, True), 1)):
        for _ in range(uses):
            assert not padded._replays.serves(form)
    forms = list(usual_forms(24, 1024))
    decodes = [form for form in forms if not form.prompt]
    expected = [*decodes, unusual, beside, alone, Form(256, True)]
    found = []
    while (form := padded._replays.next_of(forms)) is not None:
        assert padded.record_next(lambda: False)
        assert padded._replays.serves(form)
        found.append(form)
    assert found[: len(expected)] == expected
    assert found[len(expected) :] == [form for form in forms if form not in expected]


def test_memory_that_runs_out_ends_recording_ahead(models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica goes on, and records a form when an iteration needs it."""
    padded = stage(models("llama"))
    assert padded._replays is not None

    def record(form: Form, urgent: Callable[[], bool]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(padded._replays, "record", record)
    assert padded.record_next(lambda: False)
    assert not padded.record_next(lambda: False)
    padded.run(decode({0: 0}), torch.tensor([1]))
    assert padded.recordings == 1


def test_memory_of_recordings_never_moves_nor_goes() -> None:
    """Outgrown memory stays: a recording holds its address."""
    fixed = Scratch(torch.float32, torch.device("cpu"), rows=4)
    one = fixed.take("a", 2, 3)
    assert fixed.take("a", 4, 3).data_ptr() == one.data_ptr()
    assert fixed.take("a", 5, 3).data_ptr() != one.data_ptr()
    assert [buffer.data_ptr() for buffer in fixed._outgrown] == [one.data_ptr()]
    loose = Scratch(torch.float32, torch.device("cpu"))
    loose.take("a", 2, 3)
    loose.take("a", 5, 3)
    assert loose._outgrown == []


class Graphs:
    """A recorder in the place of CUDA's; ``log``: what is done, with the number of the graph."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.made = 0

    def recording(self) -> Any:
        return nullcontext()

    def begin(self) -> Any:
        self.made += 1
        graph: Any = type("Graph", (), {})()
        graph.capture_end = lambda number=self.made: self.log.append(("end", number))
        graph.replay = lambda number=self.made: self.log.append(("replay", number))
        self.log.append(("begin", self.made))
        return graph


def replay_of(layers: int, log: list[tuple[str, int]]) -> Replay:
    """A replay whose step calls back before each of its layers."""

    def step(inputs: torch.Tensor, slots: object, positions: object, answering: object, between: Callable[[], None]) -> Any:
        for layer in range(layers):
            between()
            log.append(("layer", layer))
        return inputs

    return Replay(Form(1), step, torch.zeros(1, 2), torch.device("cpu"), is_last=False)


@pytest.mark.parametrize(("layers", "graphs"), [(1, 1), (2, 1), (3, 2), (32, 2)])
def test_a_recording_is_launched_in_two_parts(layers: int, graphs: int) -> None:
    """The host launches most of it while the GPU computes the first two layers; the parts follow one another."""
    recorder: Any = Graphs()
    replay = replay_of(layers, recorder.log)
    replay(decode({0: 0}), torch.zeros(1, 2), recorder)
    recorded = recorder.log[layers:]  # after the computation that loads libraries
    first = [("layer", layer) for layer in range(min(layers, 2))]
    later = [("begin", 2), *(("layer", layer) for layer in range(2, layers)), ("end", 2)]
    assert recorded == [("begin", 1), *first, ("end", 1), *(later if graphs == 2 else [])]
    recorder.log.clear()
    replay(decode({0: 1}), torch.zeros(1, 2), recorder)
    assert recorder.log == [("replay", number) for number in range(1, graphs + 1)]


@pytest.mark.parametrize("stop", range(1, 5))
def test_a_part_that_is_given_up_is_ended_and_not_replayed(stop: int) -> None:
    recorder: Any = Graphs()
    replay = replay_of(4, [])
    asked = iter(range(-3, 5))  # four layers are computed first

    def between() -> None:
        if next(asked) == stop:
            raise Abandoned

    with pytest.raises(Abandoned):
        replay.record(recorder, between)
    assert not replay.recorded
    assert [what for what, _ in recorder.log] == ["begin", "end"] * (1 if stop <= 3 else 2)
