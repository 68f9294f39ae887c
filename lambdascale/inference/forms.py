"""Forms of iterations that are replayed: numbers of rows that are fixed, to which iterations are padded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lambdascale.inference.batch import StageBatch

# Iterations of more rows wait for arithmetic, not for launches.
MOST_REPLAYED = 1024
_LEAST_ROWS = 64
# Rows of a tile of matrix products on GPUs: padding up to a multiple costs next to nothing.
_TILE = 128
_LEAST_DECODES = 8
# Measured for 7B on H200s (results/LOG.md, 2026-11-28): a recording under load takes 22 to 50 ms; a prompt's iteration of up to
# so many rows takes less as a graph by 2.2 to 7.6 ms, and a larger one by 0.6 ms (beside 64 cores) to 4.6 ms (16 cores).
_RECORDING_MS, _FEW_ROWS, _SAVED_FEW_MS, _SAVED_MANY_MS = 36.0, 256, 4.0, 2.0


@dataclass(frozen=True)
class Form:
    """``rows`` of an iteration, padding included: decodes alone, or one whole ``prompt`` followed by at most ``decodes``."""

    rows: int
    prompt: bool = False
    decodes: int = 0

    @property
    def answers(self) -> int:
        """Number of rows that may get a token: all, or the prompt's last one and the decodes."""
        return 1 + self.decodes if self.prompt else self.rows


def form_of(batch: StageBatch, most_rows: int) -> Form | None:
    """Return the form that an iteration is padded to; None for those that are not replayed.

    Those have several prompts, parts of prompts that do not begin them, or with a prompt more than ``most_rows`` in all.
    """
    if batch.decodes == len(batch.segments):
        return Form(_power(batch.decodes)) if batch.decodes else None
    prompts, first = len(batch.segments) - batch.decodes, batch.segments[0]
    if prompts > 1 or first.start > 0 or batch.rows > most_rows or min(batch.wanted, default=batch.rows) < first_answer(batch):
        return None
    return Form(_prompt_rows(batch.rows), True, max(_LEAST_DECODES, _power(batch.decodes)) if batch.decodes else 0)


def pays(form: Form, uses: int) -> bool:
    """Return True if a form is to be recorded under load, after so many ``uses`` without a graph.

    Decodes repeat hundreds of times: at once. A prompt's form when its uses have cost as much as a recording does, so that never
    more than twice what was necessary is spent, whatever follows.
    """
    if not form.prompt:
        return True
    return uses * (_SAVED_FEW_MS if form.rows <= _FEW_ROWS else _SAVED_MANY_MS) >= _RECORDING_MS


def first_answer(batch: StageBatch) -> int:
    """Return the first of the rows that an iteration's form gives results for: it and all after it."""
    return 0 if batch.decodes == len(batch.segments) else batch.segments[0].tokens - 1


def usual_forms(slots: int, most_rows: int) -> Iterator[Form]:
    """Return forms in the order in which to record them ahead: decodes, then prompts alone, then prompts beside a few decodes."""
    yield from (Form(1 << index) for index in range((min(slots, 32) - 1).bit_length() + 1))
    sizes = sorted({_prompt_rows(rows) for rows in range(1, most_rows + 1)})
    yield from (Form(rows, True) for rows in sizes)
    if slots > 1:
        yield from (Form(rows, True, _LEAST_DECODES) for rows in sizes)


def _prompt_rows(rows: int) -> int:
    return _LEAST_ROWS if rows <= _LEAST_ROWS else -(-rows // _TILE) * _TILE


def _power(rows: int) -> int:
    return 1 << (rows - 1).bit_length()
