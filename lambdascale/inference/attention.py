"""Attention of an iteration that mixes prefills and decodes, by torch's operator, over the KV memory of a stage.

Keys are cut to the context of each part, so that no key is read that no query attends to. These shapes change with every step,
and cuDNN would build a plan for each, which took 43 of 49 ms on a Hopper GPU. A stage on a GPU therefore does not use cuDNN's
attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from lambdascale.checkpoints import Architecture
from lambdascale.inference.batch import Segment, StageBatch
from lambdascale.inference.kv_cache import KvCache
from lambdascale.inference.operators import Window
from lambdascale.inference.scratch import Scratch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Decodes:
    """Decoding sequences attended together: slots [low, high), each row's place among them, and masks by window."""

    low: int
    high: int
    rows: Tensor | None  # None: every slot of the range decodes, in order
    context: int
    masks: dict[Window, Tensor | None]


@dataclass(frozen=True)
class Prefill:
    """Segments alike in all but their slots [low, high), which follow one another: their rows, and masks by window (None: plain
    causal).
    """

    begin: int
    end: int
    low: int
    high: int
    context: int
    masks: dict[Window, Tensor | None]


@dataclass(frozen=True)
class Parts:
    """Rows of one call: those of prefills, then ``decodes`` (None if the batch has none or they are computed elsewhere)."""

    prefills: tuple[Prefill, ...]
    decodes: Decodes | None

    @property
    def prefilled(self) -> int:
        """Number of rows of prefills."""
        return self.prefills[-1].end if self.prefills else 0


class BatchAttention:
    """Attention of a stage's layers. ``windows``: attention window of each layer in tokens, None for the whole context."""

    def __init__(self, architecture: Architecture, kv: KvCache, windows: Sequence[Window], scratch: Scratch) -> None:
        self._architecture = architecture
        self._kv = kv
        self._windows = windows
        self._kinds = set(windows)
        self._scratch = scratch
        self._device, self._dtype = kv.both.device, kv.both.dtype
        if self._device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)

    def parts(self, batch: StageBatch, *, decodes: bool = True) -> Parts:
        """Return the parts of a batch; without ``decodes``, those of its prefills only."""
        return Parts(tuple(self._prefills(batch)), self._decodes(batch) if decodes else None)

    def attend(self, index: int, query: Tensor, parts: Parts, decoded: Tensor | None = None) -> Tensor:
        """Return the attention of ``query`` [rows, heads, head size] in the stage's layer ``index``: [rows, heads x head size].

        ``decoded``: results, computed elsewhere, of the rows that follow. The next call overwrites the returned tensor.
        """
        window = self._windows[index]
        found = [self._attend_prefill(index, query[p.begin : p.end], p, window) for p in parts.prefills]
        if parts.decodes is not None:
            found.append(self._attend_decodes(index, query[parts.prefilled :], parts.decodes, window))
        if decoded is not None:
            found.append(decoded)
        if not found:  # a prefill's part that gives no token yet, in the last layer
            return query.flatten(1)
        if len(found) == 1:
            return found[0]
        return torch.cat(found, out=self._scratch.take("joined", sum(map(len, found)), found[0].shape[1]))

    def _attend_prefill(self, index: int, query: Tensor, part: Prefill, window: Window) -> Tensor:
        keys = self._kv.keys[index, part.low : part.high, :, : part.context]
        values = self._kv.values[index, part.low : part.high, :, : part.context]
        mask = part.masks[window]
        each = query.view(part.high - part.low, -1, *query.shape[1:]).transpose(1, 2)
        result = functional.scaled_dot_product_attention(
            each, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return result.transpose(1, 2).reshape(query.shape[0], -1)

    def _attend_decodes(self, index: int, query: Tensor, part: Decodes, window: Window) -> Tensor:
        """Compute decodes with the queries that share a kv head as rows of one attention, so that keys are read once for them."""
        a = self._architecture
        count = query.shape[0]
        grouped = query.reshape(count, a.kv_heads, a.heads // a.kv_heads, a.head_dim)
        if part.rows is not None:
            spread = grouped.new_zeros((part.high - part.low, *grouped.shape[1:]))
            spread[part.rows] = grouped
            grouped = spread
        keys = self._kv.keys[index, part.low : part.high, :, : part.context]
        values = self._kv.values[index, part.low : part.high, :, : part.context]
        result = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=part.masks[window])
        if part.rows is not None:
            result = result[part.rows]
        return result.reshape(count, a.heads * a.head_dim)

    # -- parts of a batch ---------------------------------------------------------------------------------------------

    def _prefills(self, batch: StageBatch) -> list[Prefill]:
        found: list[Prefill] = []
        begin, first = 0, None
        for segment in batch.segments[: len(batch.segments) - batch.decodes]:
            end = begin + segment.tokens
            if first is not None and segment == Segment(found[-1].high, first.start, first.tokens):
                found[-1] = replace(found[-1], end=end, high=segment.slot + 1)
            else:
                first = segment
                masks = {window: self._prefill_mask(segment, window) for window in self._kinds}
                found.append(Prefill(begin, end, segment.slot, segment.slot + 1, segment.start + segment.tokens, masks))
            begin = end
        return found

    def _prefill_mask(self, segment: Segment, window: Window) -> Tensor | None:
        context = segment.start + segment.tokens
        if segment.start == 0 and (window is None or context <= window):
            return None
        return self._mask(torch.arange(segment.start, context), context, window)

    def _decodes(self, batch: StageBatch) -> Decodes | None:
        if not batch.decodes:
            return None
        segments = batch.segments[len(batch.segments) - batch.decodes :]
        low, high = segments[0].slot, segments[-1].slot + 1
        rows = None if high - low == len(segments) else [segment.slot - low for segment in segments]
        positions = torch.zeros(high - low, dtype=torch.long)
        positions[[segment.slot - low for segment in segments]] = torch.tensor([segment.start for segment in segments])
        context = max(segment.start for segment in segments) + 1
        masks = {window: self._decode_mask(positions, context, window) for window in self._kinds}
        return Decodes(low, high, None if rows is None else self._there(torch.tensor(rows)), context, masks)

    def _decode_mask(self, positions: Tensor, context: int, window: Window) -> Tensor | None:
        if int(positions.min()) == context - 1 and (window is None or context <= window):
            return None
        return self._mask(positions, context, window)[:, None, None]

    def _mask(self, positions: Tensor, context: int, window: Window) -> Tensor:
        """Return addends to the scores of queries at ``positions``, [positions, context]: 0 where they attend, else -inf."""
        places = torch.arange(context)
        hidden = places > positions[:, None]
        if window is not None:
            hidden |= places <= positions[:, None] - window
        return self._there(torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, float("-inf")))

    def _there(self, tensor: Tensor) -> Tensor:
        """Copy to the device, without waiting (from pageable memory, CUDA has read the source when the call returns)."""
        return tensor.to(self._device, non_blocking=True)


def attend_whole(states: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Causal attention of one whole sequence: from rotated queries, rotated keys and values to [rows, heads x head size].

    ``states`` [rows, heads + 2 kv heads, head size]. Rows behind the sequence's end change nothing for it.
    """
    query, keys, values = (part[None].transpose(1, 2) for part in states.split((heads, kv_heads, kv_heads), dim=1))
    result = functional.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    return result.transpose(1, 2).reshape(len(states), -1)
