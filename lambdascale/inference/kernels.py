"""Triton kernels of a decode step: few launches, every weight and key read once.

lambdascale.inference.operators is their reference, in torch. Imported only where Triton is installed and a GPU computes.

Triton compiles a kernel anew for arguments that are multiples of 16 and for those that are not, which takes half a second in the
middle of serving. Numbers of rows, and slots and positions that begin at any row, are therefore not told apart.

EARLY: the GPU may start a kernel as soon as every program of the one before it in its stream has ended, or, if that one TRIGGERS,
has read what it reads (programmatic dependent launch). Such a kernel waits for the end of the one before ahead of its first
access to memory. Earlier starts make steps much longer: programs that wait fill the multiprocessors that have room, and later
share those.
"""

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton before 3.4
    gdc_launch_dependents = gdc_wait = None
STARTS_EARLY = gdc_wait is not None


@triton.jit(do_not_specialize_on_alignment=["rows"])
def linear_kernel(
    x: tl.tensor,
    squares: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    norm: tl.tensor,
    scaled: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SUMMED: tl.constexpr,
    SWAPPED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    GATED: tl.constexpr,
    PREPARES: tl.constexpr,
    TRIGGERS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """``out`` [rows, outputs] of ``x`` [rows, inputs] times ``weight`` [outputs, inputs] transposed, for rows <= BLOCK_M.

    BIASED: plus ``bias``. ADDED: plus what ``out`` holds. GATED: ``weight`` and ``bias`` have 2 x outputs rows, and the result is
    silu(first half) times the second. SWAPPED: weights are the left operand, of which Hopper's matrix units take 64 rows.

    An RMS norm is divided between the kernel before it and the one after. PREPARES: ``scaled`` becomes ``out`` times ``norm``,
    and ``squares`` [rows, programs] the sum of the squares of each program's outputs. Unless ADDED, ``x`` and ``squares`` are
    such, of SUMMED inputs a program: the norm's scale, one number a row, is applied to the sums at the end.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    inside = n < outputs
    lines = weight + n[:, None].to(tl.int64) * inputs
    other = lines + outputs.to(tl.int64) * inputs
    if EARLY:
        gdc_wait()
    if not ADDED:
        s = tl.arange(0, BLOCK_S)
        parts = tl.cdiv(inputs, SUMMED)
        each = tl.load(squares + m[:, None] * parts + s[None, :], mask=(m < rows)[:, None] & (s < parts)[None, :], other=0.0)
        scale = tl.rsqrt(tl.sum(each, 1) / inputs + eps)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, inputs, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        valid = (k < inputs) | EVEN_K
        mask = inside[:, None] & valid[None, :]
        given = tl.load(x + m[:, None] * x_stride + k[None, :], mask=(m < rows)[:, None] & valid[None, :], other=0.0)
        w = tl.load(lines + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        if SWAPPED:
            total = tl.dot(w, tl.trans(given), total, input_precision="ieee")
        else:
            total = tl.dot(given, tl.trans(w), total, input_precision="ieee")
        if GATED:
            v = tl.load(other + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            if SWAPPED:
                second = tl.dot(v, tl.trans(given), second, input_precision="ieee")
            else:
                second = tl.dot(given, tl.trans(v), second, input_precision="ieee")
    if TRIGGERS:
        gdc_launch_dependents()
    result = tl.trans(total) if SWAPPED else total
    at = m[:, None] * outputs + n[None, :]
    kept = (m < rows)[:, None] & inside[None, :]
    if not ADDED:
        result *= scale
    if BIASED:
        result += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate = (tl.trans(second) if SWAPPED else second) * scale
        if BIASED:
            gate += tl.load(bias + outputs + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        result = result * tl.sigmoid(result) * gate
    if ADDED:
        result += tl.load(out + at, mask=kept, other=0.0).to(tl.float32)
    rounded = result.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=kept)
    if PREPARES:
        exact = tl.where(kept, rounded.to(tl.float32), 0.0)
        weights = tl.load(norm + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(scaled + at, (exact * weights[None, :]).to(scaled.dtype.element_ty), mask=kept)
        tl.store(squares + m * tl.cdiv(outputs, BLOCK_N) + tl.program_id(0), tl.sum(exact * exact, 1), mask=m < rows)


@triton.jit
def norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    squares: tl.tensor,
    inputs: tl.tensor,
    eps: tl.tensor,
    SUMMED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """RMS norm of a row of ``x`` [rows, inputs] times ``weight``, for inputs <= BLOCK.

    ``squares`` [rows, parts], for ``linear_kernel``: their sum is that of a row that needs no further scaling.
    """
    if EARLY:
        gdc_wait()
    k = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    given = tl.load(x + row * inputs + k, mask=k < inputs, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(given * given, 0) / inputs + eps)
    weights = tl.load(weight + k, mask=k < inputs, other=0.0).to(tl.float32)
    tl.store(out + row * inputs + k, (given * scale * weights).to(out.dtype.element_ty), mask=k < inputs)
    parts = tl.cdiv(inputs, SUMMED)
    tl.store(squares + row * parts + k, tl.where(k == 0, inputs * (1.0 - eps), 0.0), mask=k < parts)


@triton.jit
def gate_kernel(both: tl.tensor, out: tl.tensor, columns: tl.tensor, BLOCK: tl.constexpr) -> None:
    """silu(first half) times the second half of a row of ``both`` [rows, 2 x columns]."""
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(both + row * 2 * columns + k, mask=k < columns, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * columns + columns + k, mask=k < columns, other=0.0).to(tl.float32)
    tl.store(out + row * columns + k, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=k < columns)


@triton.jit(do_not_specialize_on_alignment=["slots", "positions"])
def rotate_kernel(
    states: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    kv: tl.tensor,
    row_stride: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Rotate a row's queries and keys in place; put its keys and values into ``kv`` [slots, 2 x kv heads, tokens, head size].

    ``states`` [rows, queries, keys and values, head size]. Rows at position -1 are padding and leave nothing.
    """
    if EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    valid = (head < HEADS + 2 * KV_HEADS)[:, None] & (d < HALF)[None, :] & (position >= 0)
    at = states + row * row_stride + head[:, None] * (2 * HALF) + d[None, :]
    low = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=valid, other=0.0).to(tl.float32)
    place = tl.maximum(position, 0) * HALF + d
    turned = (head < HEADS + KV_HEADS)[:, None]
    c = tl.where(turned, tl.load(cos + place, mask=d < HALF, other=0.0).to(tl.float32)[None, :], 1.0)
    s = tl.where(turned, tl.load(sin + place, mask=d < HALF, other=0.0).to(tl.float32)[None, :], 0.0)
    new_low = (low * c - high * s).to(states.dtype.element_ty)
    new_high = (high * c + low * s).to(states.dtype.element_ty)
    tl.store(at, new_low, mask=valid & turned)
    tl.store(at + HALF, new_high, mask=valid & turned)
    to = kv + slot * slot_stride + (head[:, None] - HEADS).to(tl.int64) * head_stride + position * (2 * HALF) + d[None, :]
    tl.store(to, new_low, mask=valid & (head >= HEADS)[:, None])
    tl.store(to + HALF, new_high, mask=valid & (head >= HEADS)[:, None])


@triton.jit
def turned(at: tl.tensor, mask: tl.tensor, d: tl.tensor, c: tl.tensor, s: tl.tensor, HALF: tl.constexpr) -> tl.tensor:
    """Return rotated vectors. ``at``: a pointer to each element ``d``. ``c``, ``s``: cosine, and sine, negative below HALF."""
    partner = tl.where(d < HALF, HALF, -HALF)
    return tl.load(at, mask=mask, other=0.0).to(tl.float32) * c + tl.load(at + partner, mask=mask, other=0.0).to(tl.float32) * s


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["slots", "positions"])
def attend_kernel(
    states: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    kv: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    parts: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    row_stride: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    splits: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROTATED: tl.constexpr,
    WHOLE: tl.constexpr,
    TRIGGERS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Attention of one token's queries that share a kv head over one of ``splits`` parts of its context (flash decoding).

    ``parts`` [rows, heads, splits, DIM] and ``sums`` [rows, heads, splits]: each part's result and the logarithm of its sum of
    weights; WHOLE: a single part, whose result goes to ``out`` [rows, heads x DIM]. ``window``: tokens that are attended,
    counted from the newest. Lengths are read on the device, so that one launch serves every context.

    ROTATED: ``states`` hold the rotated queries, and ``kv`` the token's own key and value. Else ``states`` [rows, queries, keys
    and values, DIM] are as projected: queries and key are rotated here, and key and value put into ``kv``.
    """
    if EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    first = tl.maximum(position + 1 - window, 0)
    length = position + (1 if ROTATED else 0)
    chunk = tl.cdiv(tl.cdiv(length - first, splits), BLOCK_T) * BLOCK_T
    begin = first + split * chunk
    end = tl.minimum(begin + chunk, length)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    inside = d < DIM
    head = kv_head * GROUP + g
    keys = kv + slot * slot_stride + kv_head.to(tl.int64) * head_stride
    values = keys + KV_HEADS * head_stride.to(tl.int64)
    at = states + row * row_stride
    kept = (g < GROUP)[:, None] & inside[None, :]
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    found = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    if ROTATED:
        q = tl.load(at + head[:, None] * DIM + d[None, :], mask=kept, other=0.0)
    else:
        HALF: tl.constexpr = DIM // 2
        place = tl.maximum(position, 0) * HALF + d % HALF
        c = tl.load(cos + place, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + place, mask=inside, other=0.0).to(tl.float32) * tl.where(d < HALF, -1.0, 1.0)
        q = turned(at + head[:, None] * DIM + d[None, :], kept, d[None, :], c[None, :], s[None, :], HALF).to(kv.dtype.element_ty)
        if (split == 0) & (position >= 0):
            # The newest token's key and value, which the loop below does not read.
            key = turned(at + (KV_HEADS * GROUP + kv_head) * DIM + d, inside, d, c, s, HALF).to(kv.dtype.element_ty)
            value = tl.load(at + (KV_HEADS * GROUP + KV_HEADS + kv_head) * DIM + d, mask=inside, other=0.0)
            tl.store(keys + position * DIM + d, key, mask=inside)
            tl.store(values + position * DIM + d, value, mask=inside)
            top = tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
            total = tl.full((BLOCK_G,), 1.0, tl.float32)
            found += value.to(tl.float32)[None, :]
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < end)[:, None] & inside[None, :]
        k = tl.load(keys + t[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        v = tl.load(values + t[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((t < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        found = found * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    if TRIGGERS:
        gdc_launch_dependents()
    seen = tl.where(total > 0, total, 1.0)
    found /= seen[:, None]
    to = row * (KV_HEADS * GROUP) + head
    if WHOLE:
        tl.store(out + to[:, None] * DIM + d[None, :], found.to(out.dtype.element_ty), mask=kept)
    else:
        to = to * splits + split
        tl.store(sums + to, tl.where(total > 0, top + tl.log(seen), float("-inf")), mask=g < GROUP)
        tl.store(parts + to[:, None] * DIM + d[None, :], found, mask=kept)


@triton.jit(do_not_specialize=["splits"])
def join_kernel(
    parts: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    splits: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TRIGGERS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Join the parts of ``attend_kernel`` to ``out`` [rows, heads x head size]; zeros for rows without a context."""
    if EARLY:
        gdc_wait()
    place = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    made = s < splits
    logs = tl.load(sums + place * splits + s, mask=made, other=float("-inf"))
    top = tl.maximum(tl.max(logs, 0), -1e30)  # finite also where every part is empty
    weights = tl.exp(logs - top)
    total = tl.sum(weights, 0)
    each = tl.load(parts + (place * splits + s)[:, None] * DIM + d[None, :], mask=made[:, None] & (d < DIM)[None, :], other=0.0)
    if TRIGGERS:
        gdc_launch_dependents()
    found = tl.sum(each * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + place * DIM + d, found.to(out.dtype.element_ty), mask=d < DIM)


@triton.jit
def digest_kernel(
    words: tl.tensor, sums: tl.tensor, count: tl.tensor, part_words: tl.tensor, BLOCK: tl.constexpr, ROUNDS: tl.constexpr
) -> None:
    """Add the mixed words of ROUNDS blocks of a part to the part's sum (see lambdascale.checkpoints.checksums)."""
    part = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.uint64)
    for index in range(ROUNDS):
        place = (tl.program_id(1) * ROUNDS + index) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        at = part * part_words + place
        valid = (place < part_words) & (at < count)
        word = tl.load(words + at, mask=valid, other=0, eviction_policy="evict_first").to(tl.uint64, bitcast=True)
        mixed = word + (place + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
        total += tl.where(valid, mixed ^ (mixed >> 31), 0)
    tl.atomic_add(sums + part, tl.sum(total, 0).to(tl.int64, bitcast=True))
