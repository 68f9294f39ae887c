"""Forms: which iterations are replayed, and padded to what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lambdascale.inference import Segment, StageBatch
from lambdascale.inference.forms import MOST_REPLAYED, Form, first_answer, form_of, pays, usual_forms


def batch(prompts: list[tuple[int, int]], decodes: int, wanted: tuple[int, ...] | None = None) -> StageBatch:
    """Prompts as (start, tokens), then decodes; wanted are the last row of each prompt and all decodes."""
    segments = [Segment(slot, start, tokens) for slot, (start, tokens) in enumerate(prompts)]
    segments += [Segment(len(prompts) + index, 9, 1) for index in range(decodes)]
    ends, rows = [], 0
    for segment in segments:
        rows += segment.tokens
        ends.append(rows - 1)
    return StageBatch(tuple(segments), decodes, tuple(ends) if wanted is None else wanted)


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (batch([], 1), Form(1)),
        (batch([], 5), Form(8)),
        (batch([], 33), Form(64)),
        (batch([(0, 1)], 0), Form(64, True)),
        (batch([(0, 64)], 0), Form(64, True)),
        (batch([(0, 65)], 0), Form(128, True)),
        (batch([(0, 300)], 0), Form(384, True)),
        (batch([(0, 512)], 0), Form(512, True)),
        (batch([(0, 504)], 8), Form(512, True, 8)),
        (batch([(0, 505)], 8), Form(640, True, 8)),
        (batch([(0, 40)], 9), Form(64, True, 16)),
        (batch([(0, 40)], 0, ()), Form(64, True)),
        (batch([(0, 1024)], 0), Form(1024, True)),
        (batch([(0, 1025)], 0), None),
        (batch([(0, 1020)], 5), None),
        (batch([(3, 40)], 0), None),
        (batch([(0, 40), (0, 40)], 2), None),
        (batch([(0, 40)], 2, (3, 39)), None),
        (StageBatch((), 0, ()), None),
    ],
)
def test_forms(given: StageBatch, form: Form | None) -> None:
    assert form_of(given, MOST_REPLAYED) == form


def test_a_window_bounds_prompts_and_not_decodes() -> None:
    """A prompt's attention in a replay is causal and no more; kernels of decodes know windows."""
    assert form_of(batch([(0, 17)], 0), 17) == Form(64, True)
    assert form_of(batch([(0, 17)], 1), 17) is None
    assert form_of(batch([], 32), 17) == Form(32)


@given(tokens=st.integers(0, 1100), decodes=st.integers(0, 40))
def test_a_form_has_room_and_is_one_of_few(tokens: int, decodes: int) -> None:
    iteration = batch([(0, tokens)] if tokens else [], decodes)
    form = form_of(iteration, MOST_REPLAYED)
    if form is None:
        assert not tokens + decodes or (tokens and tokens + decodes > MOST_REPLAYED)
        return
    assert iteration.rows <= form.rows <= max(2 * decodes, iteration.rows + 127)
    assert len(iteration.wanted) <= form.answers
    assert first_answer(iteration) + len(iteration.wanted) == iteration.rows
    assert form.decodes >= decodes * form.prompt
    if decodes <= 8:
        assert form in set(usual_forms(8, MOST_REPLAYED))


def test_what_is_recorded_ahead_comes_in_the_order_of_use() -> None:
    assert list(usual_forms(3, 130)) == [
        *(Form(1), Form(2), Form(4)),
        *(Form(64, True), Form(128, True), Form(256, True)),
        *(Form(64, True, 8), Form(128, True, 8), Form(256, True, 8)),
    ]
    assert list(usual_forms(1, 64)) == [Form(1), Form(64, True)]
    assert max(form.rows for form in usual_forms(256, 64) if not form.prompt) == 32


@pytest.mark.parametrize(
    ("form", "least"),
    [(Form(1), 0), (Form(32), 0), (Form(64, True), 9), (Form(256, True, 8), 9), (Form(384, True), 18), (Form(1024, True), 18)],
)
def test_uses_after_which_a_recording_pays(form: Form, least: int) -> None:
    """36 ms, against 4 ms or 2 ms a use of a prompt's form. Mutation: paid before its uses have cost as much."""
    assert pays(form, least)
    assert not least or not pays(form, least - 1)
