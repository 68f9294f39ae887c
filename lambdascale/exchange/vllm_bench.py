"""The JSON that ``vllm bench serve --save-result --save-detailed`` writes, by its documented keys.

Definitions are those of vLLM: TPOT of answers with more than one token, standard deviations of the whole population, percentiles
interpolated linearly, a failed request with 0 output tokens and its reason in ``errors``. Keys about gaps between tokens
(``itls`` and others) need the token times of all answers, and are left out otherwise. ``e2els``, no key of
vLLM's, holds the latencies, so that a file without ``itls`` can be read back. ``generated_texts`` are empty.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from lambdascale.core import UserError
from lambdascale.exchange.results import Results, mean_gap_s, read_text, tidy

_PERCENTILES = (50, 90, 95, 99)
_MS = 1e3


def text(results: Results) -> str:
    """The document of a run."""
    return json.dumps(document(results), allow_nan=False) + "\n"


def document(results: Results) -> dict[str, Any]:
    """Keys and values of the document."""
    rows, ok, seconds = results.requests, results.completed, results.duration_s
    answered = int(ok.output_tokens.sum())
    asked = int(ok.prompt_tokens.sum())
    gaps = _gaps(results)
    found: dict[str, Any] = {
        "backend": f"lambdascale-{results.backend}",
        "label": results.system,
        "model_id": "+".join(sorted({str(name) for name in rows.model if name is not None})) or None,
        "num_prompts": len(rows),
        "request_rate": _requested_per_s(results),
        "max_concurrency": None,
        "duration": seconds,
        "completed": len(ok),
        "failed": len(rows) - len(ok),
        "total_input_tokens": asked,
        "total_output_tokens": answered,
        "request_throughput": _per_s(len(ok), seconds),
        "request_goodput": results.goodput_per_s,
        "output_throughput": _per_s(answered, seconds),
        "total_token_throughput": _per_s(asked + answered, seconds),
        "input_lens": [int(tokens) for tokens in rows.prompt_tokens.fillna(0)],
        "output_lens": [int(tokens) for tokens in rows.output_tokens.where(rows.status == "ok").fillna(0)],
        "ttfts": _or_zero(results, "ttft_s"),
        "start_times": rows.arrival_s.tolist(),
        "e2els": _or_zero(results, "e2e_s"),
        "generated_texts": [""] * len(rows),
        "errors": ["" if row.status == "ok" else row.failure or "failed" for row in rows.itertuples()],
        "max_concurrent_requests": _peak(results),
        **_statistics("ttft", ok.ttft_s.to_numpy()),
        **_statistics("tpot", ok.tpot_s.dropna().to_numpy()),
        **_statistics("e2el", ok.e2e_s.to_numpy()),
    }
    if gaps is not None:
        found["itls"] = gaps
        found |= _statistics("itl", np.array([gap for row in gaps for gap in row]))
        found["max_output_tokens_per_s"] = _token_peak(results)
    return found


def _per_s(count: float, seconds: float) -> float:
    return count / seconds if seconds else 0.0


def _requested_per_s(results: Results) -> float | str:
    """Requests per second of the arrivals; "inf", as vLLM writes it, if all arrive at once."""
    arrivals = results.requests.arrival_s
    span_s = float(arrivals.max() - arrivals.min()) if len(arrivals) else 0.0
    return len(arrivals) / span_s if span_s else "inf"


def _or_zero(results: Results, column: str) -> list[float]:
    rows = results.requests
    return [float(value) for value in rows[column].where(rows.status == "ok").fillna(0.0)]


def _gaps(results: Results) -> list[list[float]] | None:
    """Gaps between the tokens of each request; None if those of an answer are not known."""
    if not results.has_gaps:
        return None
    rows = results.requests
    return [list(gaps or ()) if status == "ok" else [] for gaps, status in zip(rows.itl_s, rows.status, strict=True)]


def _statistics(name: str, seconds: Any) -> dict[str, float]:
    """Mean, median, deviation and percentiles in milliseconds; 0 without values, as vLLM has it."""
    values = np.asarray(seconds, dtype=np.float64) * _MS if len(seconds) else np.zeros(1)
    found = {f"mean_{name}_ms": values.mean(), f"median_{name}_ms": np.median(values), f"std_{name}_ms": values.std()}
    found |= {f"p{level}_{name}_ms": np.percentile(values, level) for level in _PERCENTILES}
    return {key: float(value) for key, value in found.items()}


def _peak(results: Results) -> int:
    """Largest number of answered requests that were open within a second, counted in seconds from the first."""
    ok = results.completed
    if ok.empty:
        return 0
    begin = np.floor(ok.arrival_s - ok.arrival_s.min()).astype(int)
    end = np.floor(ok.arrival_s + ok.e2e_s - ok.arrival_s.min()).astype(int)
    steps = np.zeros(int(end.max()) + 2)
    np.add.at(steps, begin.to_numpy(), 1)
    np.add.at(steps, end.to_numpy() + 1, -1)
    return int(steps.cumsum().max())


def _token_peak(results: Results) -> float:
    """Largest number of tokens within a second, counted in seconds from the first arrival of an answered request."""
    ok = results.completed
    begin = ok.arrival_s.min()
    first = ok.arrival_s - begin + ok.ttft_s
    times = [at + np.cumsum([0.0, *(gaps or ())]) for at, gaps in zip(first, ok.itl_s, strict=True)]
    return float(np.bincount(np.concatenate(times).astype(int)).max()) if times else 0.0


_NEEDED = ("input_lens", "output_lens", "ttfts", "start_times", "errors")


def read(path: Path) -> Results:
    """Read a file of vLLM's, or of ours; UserError if it lacks the keys of --save-detailed, or does not fit together."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict) or (missing := [key for key in _NEEDED if not isinstance(found.get(key), list)]):
        what = "it is no JSON object" if not isinstance(found, dict) else f"it lacks {', '.join(missing)}"
        raise UserError(f"{path} is no detailed result of vllm bench serve (--save-result --save-detailed): {what}")
    count = len(found["errors"])
    columns = {key: found[key] for key in (*_NEEDED, "e2els", "itls") if key in found}
    if strange := [key for key, values in columns.items() if not isinstance(values, list) or len(values) != count]:
        raise UserError(f"{path}: {', '.join(strange)} must have an entry for each of the {count} requests in errors")
    if "e2els" not in found and "itls" not in found:
        raise UserError(f"{path} has neither itls nor e2els: the ends of answers are unknown")
    try:
        rows = [_row(index, found) for index in range(count)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: an entry is no number: {error}") from error
    return Results(
        requests=tidy(rows),
        backend=str(found.get("backend", "vllm")).removeprefix("lambdascale-"),
        system=str(found.get("label")),
        goodput_per_s=found.get("request_goodput"),
    )


def _row(index: int, found: dict[str, Any]) -> dict[str, Any]:
    begin_s = min(float(at) for at in found["start_times"])
    row: dict[str, Any] = {
        "request_id": index,
        "model": found.get("model_id"),
        "arrival_s": float(found["start_times"][index]) - begin_s,
        "prompt_tokens": int(found["input_lens"][index]),
    }
    if found["errors"][index]:
        return row | {"status": "failed", "failure": str(found["errors"][index])}
    tokens, ttft_s = int(found["output_lens"][index]), float(found["ttfts"][index])
    gaps = [float(gap) for gap in found["itls"][index]] if "itls" in found else None
    e2e_s = float(found["e2els"][index]) if "e2els" in found else ttft_s + math.fsum(gaps or ())
    # A chunk may hold several tokens: then the gaps are not those between tokens.
    known = gaps is not None and len(gaps) == tokens - 1
    return row | {
        "output_tokens": tokens,
        "ttft_s": ttft_s,
        "e2e_s": e2e_s,
        "tpot_s": mean_gap_s(ttft_s, e2e_s, tokens),
        "itl_s": gaps if known else None,
        "status": "ok",
    }
