"""Iterations as CUDA graphs: the hundreds of launches of an iteration are recorded once for each form and replayed by two calls.

A recording has fixed addresses and a fixed number of rows: an iteration is padded to its form, and what it needs from the host
lies in registered memory that the recording itself reads. It also chooses the likeliest tokens and brings them back. One
recording serves contexts of any length, since kernels read positions on the device.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import torch

from lambdascale.inference.batch import StageBatch
from lambdascale.inference.forms import MOST_REPLAYED, Form, pays

Tensor = torch.Tensor
# From inputs, slots [rows], positions [rows] (-1: padding) and answering rows [answers] to hidden states [rows, hidden] or logits
# [answers, vocabulary], without the host. Calls its last argument between two layers.
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Callable[[], None]], Tensor]


# To launch a graph takes the host 0.3 to 1 us for each of its kernels, before the first of them starts. So a recording is two
# graphs: the device computes these layers while the host launches the others.
_FIRST_LAYERS = 2


class Abandoned(Exception):
    """Ends the recording of a CUDA graph, since more urgent work waits."""


class Replay:
    """A step of one form. ``hidden``: memory for inputs [rows, hidden]; None if they are token ids. ``is_last``: it gives logits.

    On a CPU every call computes the step, with the same padding and copies, for tests. On a GPU the first call does, and records.
    """

    def __init__(self, form: Form, step: Step, hidden: Tensor | None, device: torch.device, *, is_last: bool) -> None:
        self._form = form
        self._step = step
        self._hidden = hidden
        self._sizes = [form.rows, form.rows, form.answers, *([form.rows] if hidden is None else [])]
        on_gpu = device.type == "cuda"
        # What comes from the host, and the tokens that go back to it: registered memory, for one copy each.
        self._staged = torch.zeros(sum(self._sizes), dtype=torch.long, pin_memory=on_gpu)
        self._tokens = torch.zeros(form.answers, dtype=torch.long, pin_memory=on_gpu) if is_last else None
        self._given = torch.zeros(sum(self._sizes), dtype=torch.long, device=device)
        self._places = [part.numpy() for part in self._staged.split(self._sizes)]
        self._places[1].fill(-1)
        # Behind the last replay, which has read what was staged for it.
        self._done = torch.cuda.Event() if on_gpu else None
        self._graphs: tuple[torch.cuda.CUDAGraph, ...] = ()
        self._output: Tensor | None = None

    @property
    def recorded(self) -> bool:
        """True once a call replays graphs."""
        return bool(self._graphs)

    def __call__(self, batch: StageBatch, inputs: Tensor, recorder: Recorder | None) -> Tensor:
        """Return the step's output in memory that the next call may overwrite. ``recorder``: on a GPU, what records."""
        self._wait()
        self._give(batch, inputs)
        if self._graphs:
            for graph in self._graphs:
                graph.replay()
            output = self._output
            assert output is not None, "recording leaves an output"
        elif recorder is None:
            output = self._compute()
        else:
            output = self.record(recorder)
        if self._done is not None:
            self._done.record()
        return output

    def greedy(self) -> list[int]:
        """Return the likeliest token of each answering row, once the device has brought them."""
        assert self._tokens is not None, "a stage that is not the last has no tokens"
        self._wait()
        found: list[int] = self._tokens.tolist()
        return found

    def record(self, recorder: Recorder, between: Callable[[], None] = lambda: None) -> Tensor:
        """Compute the step over what was given last, at first padding; then record it. Return what was computed.

        To compute it loads libraries, which a recording cannot. Calls ``between`` between two layers, which may raise.
        """
        with recorder.recording():
            output = self._compute(between)
            layers, graphs = count(), [recorder.begin()]

            def cut() -> None:
                between()
                if next(layers) == _FIRST_LAYERS:
                    graphs[-1].capture_end()
                    graphs.append(recorder.begin())

            try:
                recorded = self._compute(cut)
            finally:
                graphs[-1].capture_end()
        self._graphs, self._output = tuple(graphs), recorded
        return output

    def _wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()

    def _give(self, batch: StageBatch, inputs: Tensor) -> None:
        """Put an iteration, padded, where the step reads it."""
        slots, positions, answering, *ids = self._places
        begin = 0
        if self._form.prompt:
            prompt = batch.segments[0]
            begin = prompt.tokens
            slots[:begin], positions[:begin] = prompt.slot, range(begin)
            # Padding repeats the first decode: its result is written twice to the same place.
            answering[0], answering[1:] = begin - 1, begin
            answering[1 : 1 + batch.decodes] = range(begin, begin + batch.decodes)
        decodes = batch.segments[len(batch.segments) - batch.decodes :]
        end = begin + batch.decodes
        slots[begin:end] = [segment.slot for segment in decodes]
        positions[begin:end] = [segment.start for segment in decodes]
        slots[end:], positions[end:] = 0, -1
        if self._hidden is not None:
            self._hidden[:end].copy_(inputs, non_blocking=True)
        else:
            ids[0][:end] = inputs.cpu().numpy()
            ids[0][end:] = 0

    def _compute(self, between: Callable[[], None] = lambda: None) -> Tensor:
        self._given.copy_(self._staged, non_blocking=True)
        slots, positions, answering, *ids = self._given.split(self._sizes)
        inputs = ids[0] if self._hidden is None else self._hidden
        output = self._step(inputs, slots, positions, answering, between)
        if self._tokens is not None:
            self._tokens.copy_(output.argmax(dim=-1), non_blocking=True)
        return output


class Recorder:
    """The stream that a stage's recordings are made in, and the memory that they share."""

    def __init__(self, device: torch.device) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        # A pool must not be used again after its last graph has been freed, as when the first recording is given up.
        self._anchor = torch.cuda.CUDAGraph()
        with self.recording():
            nothing = torch.zeros(1, device=device)
            self._begin(self._anchor)
            nothing.zero_()
            self._anchor.capture_end()

    def begin(self) -> torch.cuda.CUDAGraph:
        """Begin to record a graph."""
        graph = torch.cuda.CUDAGraph()
        self._begin(graph)
        return graph

    def _begin(self, graph: torch.cuda.CUDAGraph) -> None:
        # Other threads may allocate meanwhile; this one must not wait for the device.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Run what a block launches in the stream, between what the current one has before and after.

        Without garbage collection, which might free CUDA objects and so break a recording.
        """
        before, collecting = torch.cuda.current_stream(), gc.isenabled()
        self._stream.wait_stream(before)
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            if collecting:
                gc.enable()
            before.wait_stream(self._stream)


class Replays:
    """The replays of a stage by their form. ``hidden``: size of hidden states that it takes, None if it takes token ids.

    ``step_of`` makes the step of a form.
    """

    def __init__(
        self, step_of: Callable[[Form], Step], dtype: torch.dtype, device: torch.device, hidden: int | None, *, is_last: bool
    ) -> None:
        self._step_of = step_of
        self._device = device
        self._is_last = is_last
        self._made: dict[Form, Replay] = {}
        self._missed: Counter[Form] = Counter()  # iterations without a graph
        self._recorder = Recorder(device) if device.type == "cuda" else None
        self._hidden = None if hidden is None else torch.zeros(MOST_REPLAYED, hidden, dtype=dtype, device=device)

    def __len__(self) -> int:
        """Number of forms whose iterations are recorded."""
        return sum(map(self.has, self._made))

    def serves(self, form: Form) -> bool:
        """Return True if a due iteration of this form runs by a graph, recorded first if need be; False: without a graph."""
        if self.has(form) or pays(form, self._missed[form]):
            return True
        self._missed[form] += 1
        return False

    def next_of(self, usual: Iterable[Form]) -> Form | None:
        """Return the form to record next: of decodes first, then what was missed most; None if nothing is left."""
        forms = (form for form in {**dict.fromkeys(usual), **self._missed} if not self.has(form))
        return min(forms, key=lambda form: (form.prompt, -self._missed[form]), default=None)

    def run(self, form: Form, batch: StageBatch, inputs: Tensor) -> tuple[Tensor, Replay]:
        """Run an iteration of this form. Return its output, in memory that the next one may overwrite, and its replay."""
        replay = self._take(form)
        return replay(batch, inputs, self._recorder), replay

    def record(self, form: Form, urgent: Callable[[], bool] = lambda: False) -> None:
        """Record a form ahead of its first use. Give up as soon as ``urgent`` between two layers."""

        def between() -> None:
            if urgent():
                raise Abandoned

        replay = self._take(form)
        if self._recorder is not None and not replay.recorded:
            with suppress(Abandoned):
                replay.record(self._recorder, between)

    def has(self, form: Form) -> bool:
        """Return True if an iteration of this form is recorded."""
        return form in self._made and (self._recorder is None or self._made[form].recorded)

    def _take(self, form: Form) -> Replay:
        if form not in self._made:
            hidden = None if self._hidden is None else self._hidden[: form.rows]
            self._made[form] = Replay(form, self._step_of(form), hidden, self._device, is_last=self._is_last)
        return self._made[form]
