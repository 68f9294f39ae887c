"""Iteration-level continuous batching (Orca, OSDI'22), pure: the live engine and the simulated replica call this class.

A scheduler belongs to one replica, or to one of the batches in flight of a pipeline. Its owner repeats: ``schedule()`` says
what the next iteration runs, the owner runs it (or works out how long it takes), ``complete()`` takes note and names the
sequences that got their first token or finished. Cost per sequence is O(log batch), however many iterations it lives,
because decoding sequences are counted in steps, not touched one by one.

KV memory is given out as vLLM does it: a sequence is admitted when the KV of what exists of it fits, its prompt and what it has
produced, and grows by a token a step. When the next step does not fit, the sequence admitted last is preempted: its KV is dropped
and computed anew, from its tokens so far, when it is admitted again, before those that came later. Engines give memory out in
pages, of 16 tokens by default; tokens are counted here: the last page of a sequence wastes 8 tokens of hundreds on average.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Literal

from msgspec import Struct

from lambdascale.core.checks import check_types, require

# Bound on how far a decode-only batch may be advanced at once when nothing else limits it.
_UNBOUNDED = 1 << 60
# One part in so many of the KV memory stays free when a sequence joins others, so that it is not preempted at once (vLLM's
# watermark of its first scheduler, 0.01).
_WATERMARK = 100


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Bounds of one iteration.

    ``max_batch`` sequences, ``max_tokens`` tokens (prompts longer than what is left are prefilled in chunks).
    ``mode`` "static" is the prototype's: a batch is formed when the last one has ended, prefilled whole and never joined.
    A node has a batch in flight for each GPU that it holds a model's layers on, in either mode.
    """

    mode: Literal["continuous", "static"] = "continuous"
    max_batch: int = 8
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        require(self.max_batch >= 1, f"BatchLimits.max_batch must be at least 1, not {self.max_batch}")
        require(
            self.max_tokens >= self.max_batch,
            f"BatchLimits.max_tokens ({self.max_tokens}) must not be below max_batch ({self.max_batch})",
        )


class BatchedRequest:
    """A request inside a scheduler.

    ``produced`` output tokens exist already when it enters (more than 0 after a mode switch); ``cached`` says that the KV
    of everything so far is resident, so that it needs no prefill. ``output_tokens`` is where the answer ends at the latest:
    nothing but the number of steps that may be merged depends on it.
    """

    __slots__ = ("_joined", "cached", "output_tokens", "prefilled", "produced", "prompt_tokens", "request_id")

    def __init__(self, request_id: int, prompt_tokens: int, output_tokens: int, produced: int = 0, cached: bool = False) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.produced = produced
        self.cached = cached
        self.prefilled = 0
        self._joined = -1

    @property
    def joined(self) -> int:
        """Decode steps that its batch had done when it began to decode there; -1 if it never did."""
        return self._joined

    @property
    def context_tokens(self) -> int:
        """Tokens to prefill before the next one can be produced: the prompt and what was produced so far."""
        return self.prompt_tokens + self.produced


class Iteration(Struct, gc=False):
    """One iteration, as ``schedule()`` orders it.

    ``prefills``: (sequence, tokens of it to prefill now). ``decodes``: how many sequences decode one token each (they are
    ``scheduler.decoding``), reading ``context_tokens`` of KV altogether. ``max_steps``: how often the iteration may be repeated
    before the batch could change (1 with prefills). ``preempted``: sequences that lost their KV to make room for it; they wait
    again. ``prefill_tokens``: sum of the prefills; ``attended_tokens``: their query-key pairs.
    """

    prefills: list[tuple[BatchedRequest, int]]
    decodes: int
    context_tokens: int
    max_steps: int
    preempted: Sequence[BatchedRequest] = ()
    prefill_tokens: int = 0
    attended_tokens: int = 0


class BatchScheduler:
    """Forms the iterations of one batch. First come, first served: in admission, and in what is kept when KV memory runs out.

    ``kv_tokens`` may change between iterations. Every sequence fits it alone, prompt and answer, and so ends some time: the one
    admitted first is never preempted while others run. KV that a waiting sequence brings along is in transit: it does not count.
    ``preemptions`` counts sequences that lost their KV.
    """

    __slots__ = (
        "_admitted",
        "_context",
        "_ends",
        "_held",
        "_prefilling",
        "_step",
        "decoding",
        "kv_tokens",
        "limits",
        "preemptions",
        "waiting",
    )

    def __init__(self, limits: BatchLimits, kv_tokens: int) -> None:
        self.limits = limits
        self.kv_tokens = kv_tokens
        self.preemptions = 0
        self.waiting: deque[BatchedRequest] = deque()
        self.decoding: dict[int, BatchedRequest] = {}
        self._prefilling: deque[BatchedRequest] = deque()
        # Running sequences in the order of their admission; the KV tokens kept for those that are being prefilled.
        self._admitted: dict[int, BatchedRequest] = {}
        self._held = 0
        self._ends: list[tuple[int, int]] = []
        self._step = 0
        self._context = 0

    def __len__(self) -> int:
        """Sequences inside, waiting ones included."""
        return len(self.waiting) + len(self._admitted)

    @property
    def running(self) -> int:
        """Sequences admitted to the batch."""
        return len(self._admitted)

    @property
    def kv_in_use(self) -> int:
        """Tokens of KV cache that the admitted requests have filled."""
        return self._context + sum(sequence.prefilled for sequence in self._prefilling)

    @property
    def kv_held(self) -> int:
        """Tokens of KV cache that no other request can have: those filled, and the rest of prompts being prefilled."""
        return self._context + self._held

    def add(self, sequence: BatchedRequest) -> None:
        """Queue a sequence. The caller refuses a sequence that could never fit the KV memory."""
        needed = sequence.prompt_tokens + sequence.output_tokens
        assert needed <= self.kv_tokens, f"request {sequence.request_id} needs more KV than the memory has"
        assert sequence.produced < sequence.output_tokens, (
            f"request {sequence.request_id} already has {sequence.produced} of its {sequence.output_tokens} tokens"
        )
        self.waiting.append(sequence)

    @property
    def admits(self) -> bool:
        """True if the longest-waiting sequence could join at the next iteration."""
        if not self.waiting or (self.limits.mode == "static" and self._admitted):
            return False
        if not self._admitted:
            return True
        return len(self._admitted) < self.limits.max_batch and self.waiting[0].context_tokens <= self._room()

    def _room(self) -> int:
        """Tokens of KV beside those held and the next tokens of decoding sequences, with the watermark to spare."""
        return self.kv_tokens - self.kv_tokens // _WATERMARK - self._context - self._held - len(self.decoding)

    def schedule(self) -> Iteration | None:
        """Return the next iteration, None without anything to run. Sequences join and are preempted here."""
        decodes, context = len(self.decoding), self._context
        preempted: Sequence[BatchedRequest] = ()
        if context + self._held + decodes > self.kv_tokens:
            preempted = self._make_room()
            decodes, context = len(self.decoding), self._context
        elif self.waiting:
            self._admit()
            decodes, context = len(self.decoding), self._context
        if self._prefilling:
            return self._prefill(decodes, preempted)
        if not decodes:
            return None
        steps, room = self._ends[0][0] - self._step, self.kv_tokens - context
        if steps * decodes > room:
            steps = max(1, room // decodes)
        return Iteration([], decodes, context, steps, preempted)

    def _make_room(self) -> list[BatchedRequest]:
        """Preempt the sequences admitted last until the next token of every decoding one fits; return them."""
        preempted = []
        while len(self._admitted) > 1 and self._context + self._held + len(self.decoding) > self.kv_tokens:
            request_id, sequence = next(reversed(self._admitted.items()))
            if request_id in self.decoding:
                self._drop(request_id)
            else:
                self._leave_prefill(sequence)
            sequence.prefilled, sequence.cached = 0, False
            self.waiting.appendleft(sequence)
            preempted.append(sequence)
        self.preemptions += len(preempted)
        return preempted

    def _admit(self) -> None:
        """Let waiting sequences join while they fit; a sequence that would be alone always does."""
        limits, waiting, admitted = self.limits, self.waiting, self._admitted
        if limits.mode == "static" and admitted:
            return
        if len(admitted) >= limits.max_batch:
            return
        room = self._room()
        while waiting and len(admitted) < limits.max_batch:
            sequence = waiting[0]
            tokens = sequence.prompt_tokens + sequence.produced
            if tokens > room and admitted:
                return
            waiting.popleft()
            admitted[sequence.request_id] = sequence
            room -= tokens
            if sequence.cached:
                self._join(sequence)
            else:
                self._held += tokens
                self._prefilling.append(sequence)

    def _prefill(self, decodes: int, preempted: Sequence[BatchedRequest]) -> Iteration:
        """Return an iteration that prefills, with the decodes that ride along."""
        limits = self.limits
        budget = limits.max_tokens - decodes if limits.mode == "continuous" else _UNBOUNDED
        prefills, tokens, attended = [], 0, 0
        for sequence in self._prefilling:
            if tokens >= budget:
                break
            done = sequence.prefilled
            count = sequence.prompt_tokens + sequence.produced - done
            if count > budget - tokens:
                count = budget - tokens
            prefills.append((sequence, count))
            tokens += count
            attended += count * done + count * (count + 1) // 2
        return Iteration(prefills, decodes, self._context, 1, preempted, tokens, attended)

    def _join(self, sequence: BatchedRequest) -> None:
        """Let a sequence whose context is in the KV cache decode from the next iteration on."""
        sequence._joined = self._step
        self.decoding[sequence.request_id] = sequence
        # The newest token has no KV yet: it is written by the step that feeds it.
        self._context += sequence.context_tokens - 1
        heappush(self._ends, (self._step + sequence.output_tokens - sequence.produced, sequence.request_id))

    def complete(
        self, iteration: Iteration, steps: int = 1, stopped: Collection[int] = ()
    ) -> tuple[list[BatchedRequest], list[BatchedRequest]]:
        """Note that ``iteration`` ran ``steps`` times; return (sequences with a new first token, finished sequences).

        ``produced`` of the sequences returned is up to date. ``stopped`` names decoding or just prefilled sequences that
        ended before their bound (an end-of-sequence token).
        """
        assert 1 <= steps <= iteration.max_steps, f"{steps} steps of an iteration good for {iteration.max_steps}"
        finished: list[BatchedRequest] = []
        first: list[BatchedRequest] = []
        if iteration.decodes:
            self._step = step = self._step + steps
            self._context += steps * iteration.decodes
            if self._ends[0][0] <= step or stopped:
                finished = self._end(stopped)
        for sequence, count in iteration.prefills:
            sequence.prefilled = prefilled = sequence.prefilled + count
            if prefilled < sequence.prompt_tokens + sequence.produced:
                continue
            ended = self._prefilling.popleft()
            assert ended is sequence, "prefills end in the order they began"
            self._held -= prefilled
            sequence.produced += 1
            if sequence.produced == 1:
                first.append(sequence)
            if sequence.produced == sequence.output_tokens or sequence.request_id in stopped:
                del self._admitted[sequence.request_id]
                finished.append(sequence)
            else:
                self._join(sequence)
        return first, finished

    def _end(self, stopped: Collection[int]) -> list[BatchedRequest]:
        """Take the decoding sequences out that have ended by now."""
        finished, ends, step = [], self._ends, self._step
        while ends and ends[0][0] <= step:
            finished.append(self._leave(heappop(ends)[1]))
        if stopped:
            finished += [self._drop(request_id) for request_id in stopped if request_id in self.decoding]
        return finished

    def _leave(self, request_id: int) -> BatchedRequest:
        sequence = self.decoding.pop(request_id)
        steps = self._step - sequence._joined
        sequence.produced = produced = sequence.produced + steps
        self._context -= sequence.prompt_tokens + produced - 1
        del self._admitted[request_id]
        return sequence

    def _leave_prefill(self, sequence: BatchedRequest) -> None:
        self._prefilling.remove(sequence)
        self._held -= sequence.context_tokens
        del self._admitted[sequence.request_id]

    def _drop(self, request_id: int) -> BatchedRequest:
        self._ends = [end for end in self._ends if end[1] != request_id]
        heapify(self._ends)
        return self._leave(request_id)

    def remove(self, request_id: int) -> BatchedRequest | None:
        """Take a sequence out and return it, None if the scheduler does not have it. Not while an iteration runs it."""
        if request_id in self.decoding:
            return self._drop(request_id)
        sequence = self._admitted.get(request_id)
        if sequence is not None:
            self._leave_prefill(sequence)
            return sequence
        sequence = next((waiting for waiting in self.waiting if waiting.request_id == request_id), None)
        if sequence is not None:
            self.waiting.remove(sequence)
        return sequence

    def drain(self) -> list[BatchedRequest]:
        """Empty the scheduler; return running sequences in the order they joined, then waiting ones, ``produced`` up to date."""
        running = [self._drop(request_id) for request_id in list(self.decoding)]
        rest = [*self._prefilling, *self.waiting]
        self._prefilling.clear()
        self._admitted.clear()
        self.waiting.clear()
        self._held = 0
        return running + rest
