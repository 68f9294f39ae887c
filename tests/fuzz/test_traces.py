"""Cells and bytes of every kind of trace: requests by the contract, or one line that names the file.

``LAMBDASCALE_FUZZ=5000`` draws more; see docs/contributing.md.
"""

from __future__ import annotations

import itertools
import json
import os
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lambdascale.workload import ArrivalsTrace, AzureFunctions2021, AzureTrace, BurstGptTrace, MooncakeTrace, RateSeriesWorkload
from tests.fuzz.outcome import ends_well

EXAMPLES = os.environ.get("LAMBDASCALE_FUZZ", "60")
SETTINGS = settings(
    max_examples=int(EXAMPLES) if EXAMPLES.isdigit() else 5000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example writes the file anew
)
MOST = 10_000
HEADS = {
    AzureTrace: "TIMESTAMP,ContextTokens,GeneratedTokens",
    BurstGptTrace: "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
    AzureFunctions2021: "app,func,end_timestamp,duration",
    ArrivalsTrace: "# times",
    RateSeriesWorkload: "# rates",
}
CELLS = st.sampled_from(
    (
        *("", " ", "0", "1", "-1", "5", "0.5", "1e3", "1e18", "1e19", "1e999", "nan", "inf", "-inf", "-0", "1_0", "0x10", "٣"),
        *("9" * 9, "9" * 5000, "true", "null", "[]", "{}", '"', '"1"', "a,b", "x\u2028y", "\0", "\ud800", "#", "ChatGPT"),
        *("2023-11-16 18:15:46.6805900", "0001-01-01 00:00:00", "9999-12-31 23:59:59", "2023-02-30 00:00:00", "API log"),
    )
) | st.floats().map(str)
VALID = {
    AzureTrace: ("2023-11-16 18:15:46.6805900", "374", "44"),
    BurstGptTrace: ("5", "ChatGPT", "472", "18", "490", "API log"),
    AzureFunctions2021: ("a", "f", "5.5", "0.5"),
    ArrivalsTrace: ("0.36",),
    RateSeriesWorkload: ("0.5",),
}


def lines(kind: type[Any]) -> st.SearchStrategy[list[str]]:
    """Lines of a trace: valid ones, some with one cell changed, and others."""
    valid = VALID[kind]
    changed = st.tuples(st.integers(0, len(valid) - 1), CELLS).map(lambda at: [*valid[: at[0]], at[1], *valid[at[0] + 1 :]])
    return st.lists(st.one_of(st.just(list(valid)), changed, st.lists(CELLS, max_size=7)).map(",".join), max_size=5)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(("timestamp", "input_length", "output_length", "hash_ids"))
ROWS = st.lists(st.dictionaries(KEYS, JSON | st.integers(0, 9) | st.integers(0, 9), max_size=4) | JSON, max_size=4)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "skip_bad_rows": st.booleans(),
        "failures": st.sampled_from(("refuse", "drop", "count")),
        "check_units": st.booleans(),
        "model_column": st.sampled_from((None, "Model", "hash_ids", "x")),
        "session_column": st.sampled_from((None, "Log Type", "timestamp", "x")),
        "block_tokens": st.sampled_from((None, 1, 512)),
        "spread_within_second": st.booleans(),
        "log_type": st.sampled_from((None, "API log")),
        "assign": st.sampled_from(("busiest", "sample", "round_robin")),
        "arrivals": st.sampled_from(("trace", "gamma")),
        "requests_per_arrival": st.sampled_from((1, 3, 10**9)),
        "start_s": st.sampled_from((0.0, 1.5, 1e9)),
        "duration_s": st.sampled_from((None, 0.0, 1.0, 1e15)),
        "repeat": st.sampled_from((1, 2, 10**9)),
        "rate_scale": st.sampled_from((0.0, 0.5, 1.5, 1e12)),
        "time_compression": st.sampled_from((1e-9, 1.0, 1e9)),
        "max_context_tokens": st.sampled_from((None, 2, 10**6)),
        "limit": st.sampled_from((None, 0, 1)),
    },
)


def check(kind: type[Any], content: bytes, options: dict[str, Any], folder: Path) -> int:
    """Read the trace as a run does; its requests obey the contract of workloads."""
    path = folder / "trace"
    path.write_bytes(content)
    known = {name: value for name, value in options.items() if name in kind.__dataclass_fields__}

    def command() -> int:
        workload = kind(path=str(path), **known)
        requests = workload.load(models=["a", "b"], seed=1, max_requests=MOST).requests
        assert len(requests) <= 2 * MOST
        assert [each.request_id for each in requests] == list(range(len(requests)))
        assert all(isfinite(each.arrival_s) and each.arrival_s >= 0 for each in requests)
        assert all(one.arrival_s <= two.arrival_s for one, two in itertools.pairwise(requests))
        assert all(each.prompt_tokens >= 1 and each.output_tokens >= 1 and each.request.max_tokens >= 1 for each in requests)
        return 0

    return ends_well(command, f"{kind.__name__} {known} {content!r:.300}")


@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
@SETTINGS
@given(data=st.data(), options=OPTIONS, end=st.sampled_from(("\n", "\r\n", "\r", "\n\n")))
def test_cells(kind: type[Any], data: st.DataObject, options: dict[str, Any], end: str, tmp_path: Path) -> None:
    text = end.join([HEADS[kind], *data.draw(lines(kind))])
    check(kind, text.encode(errors="surrogatepass"), options, tmp_path)


@SETTINGS
@given(rows=ROWS, options=OPTIONS)
def test_json_lines(rows: list[Any], options: dict[str, Any], tmp_path: Path) -> None:
    check(MooncakeTrace, "\n".join(map(json.dumps, rows)).encode(), options, tmp_path)


@pytest.mark.parametrize("kind", [*HEADS, MooncakeTrace], ids=lambda kind: kind.__name__)
@SETTINGS
@given(content=st.binary(max_size=60), options=OPTIONS)
def test_bytes(kind: type[Any], content: bytes, options: dict[str, Any], tmp_path: Path) -> None:
    check(kind, content, options, tmp_path)


def test_a_line_nested_deeply(tmp_path: Path) -> None:
    content = b'{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert check(MooncakeTrace, content, {}, tmp_path) == 2
    good = b'{"timestamp": 1, "input_length": 5, "output_length": 5}\n'
    assert check(MooncakeTrace, good + content, {"skip_bad_rows": True}, tmp_path) == 0
