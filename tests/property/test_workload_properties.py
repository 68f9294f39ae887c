"""Every workload fulfils the contract of lambdascale.workload.base under any rescaling."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lambdascale.core import TracedRequest, TraceError
from lambdascale.workload import ArrivalsTrace, AzureTrace, BurstyWorkload, ConstantRate
from lambdascale.workload.rows import BadRow, timestamp_ns
from lambdascale.workload.shaping import DEFAULT_LIMIT

SHAPING = st.fixed_dictionaries(
    {},
    optional={
        "time_compression": st.floats(0.1, 50),
        "rate_scale": st.just(0.0) | st.floats(1e-9, 4),
        "repeat": st.integers(1, 3),
        "limit": st.none() | st.integers(0, 200),
        "max_prompt_tokens": st.none() | st.integers(1, 5000),
        "max_output_tokens": st.integers(1, 500),
        "max_context_tokens": st.none() | st.integers(2, 5000),
        "popularity": st.sampled_from(["first", "zipf"]),
        "zipf_exponent": st.just(0.0) | st.floats(1e-9, 5),
        "lengths": st.sampled_from(["fixed", "azure", "burstgpt"]),
    },
)
TIMES = st.lists(st.floats(0, 1e6), min_size=2, max_size=40).filter(lambda times: max(times) > min(times))


def check(requests: list[TracedRequest], shaping: dict[str, Any], models: list[str]) -> None:
    assert [r.request_id for r in requests] == list(range(len(requests)))
    arrivals = [r.arrival_s for r in requests]
    assert arrivals == sorted(arrivals)
    assert all(t >= 0 for t in arrivals)
    assert {r.model for r in requests} <= set(models)
    for r in requests:
        assert 1 <= r.prompt_tokens <= (shaping.get("max_prompt_tokens") or 10**9)
        assert 1 <= r.output_tokens <= (shaping.get("max_output_tokens") or 10**9)
        assert r.prompt_tokens + r.output_tokens <= (shaping.get("max_context_tokens") or 10**9)
        assert r.output_tokens <= r.request.max_tokens <= shaping.get("max_output_tokens", DEFAULT_LIMIT)
        assert r.request.kv_tokens <= (shaping.get("max_context_tokens") or 10**9)
    limit = shaping.get("limit")
    assert limit is None or len(requests) <= limit


@settings(max_examples=60, deadline=None)
@given(shaping=SHAPING, seed=st.integers(0, 2**32), count=st.integers(1, 4), duration=st.just(0.0) | st.floats(1e-9, 400))
def test_generated(shaping: dict[str, Any], seed: int, count: int, duration: float) -> None:
    models = [f"m{i}" for i in range(count)]
    for workload in (
        BurstyWorkload(duration_s=duration + 1e-3, **shaping),
        ConstantRate(rate_rps=0.3, duration_s=duration + 1e-3, process="gamma", **shaping),
    ):
        requests = list(workload.requests(models=models, seed=seed))
        check(requests, {"max_context_tokens": getattr(workload, "max_context_tokens", None), **shaping}, models)
        assert list(workload.requests(models=models, seed=seed)) == requests


@example(times=[0.0, 2756.0], shaping={"rate_scale": 2.0}, start=0.0, duration=4639.0, batch=1)  # a copy past the window
@settings(max_examples=60, deadline=None)
@given(
    times=TIMES,
    shaping=SHAPING,
    start=st.just(0.0) | st.floats(1e-9, 1e6),
    duration=st.none() | st.floats(1e-3, 1e6),
    batch=st.integers(1, 4),
)
def test_arrivals_from_a_file(
    times: list[float], shaping: dict[str, Any], start: float, duration: float | None, batch: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arrivals.txt"
        path.write_text("".join(f"{t!r}\n" for t in times))
        workload = ArrivalsTrace(path=str(path), start_s=start, duration_s=duration, requests_per_arrival=batch, **shaping)
        requests = list(workload.requests(models=["a", "b"], seed=1))
        check(requests, shaping, ["a", "b"])
        plain = [r.arrival_s for r in ArrivalsTrace(path=str(path)).requests(models=["a"], seed=9)]
    assert plain == sorted(t - min(times) for t in times)
    if duration is not None and requests:
        bound = duration * shaping.get("repeat", 1) / shaping.get("time_compression", 1.0)
        slack = 1 + 1e-9
        assert requests[-1].arrival_s <= bound * slack


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet=st.characters(codec="utf-8"), max_size=40)
    | st.from_regex(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{1,9})?", fullmatch=True)
)
def test_a_timestamp_is_read_or_refused(text: str) -> None:
    complaint = ""
    try:
        assert abs(timestamp_ns(text)) < 10**21
    except BadRow as error:
        complaint = str(error)
    assert "\n" not in complaint


@settings(max_examples=80, deadline=None)
@given(content=st.binary(max_size=200), header=st.booleans())
def test_any_bytes_are_requests_or_a_trace_error(content: bytes, header: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        path.write_bytes((b"TIMESTAMP,ContextTokens,GeneratedTokens\n" if header else b"") + content)
        for workload in (AzureTrace(path=str(path), skip_bad_rows=True), ArrivalsTrace(path=str(path))):
            complaint = "one line"
            try:
                assert workload.requests(models=["m"], seed=0)
            except TraceError as error:
                complaint = str(error)
            assert len(complaint.splitlines()) == 1
