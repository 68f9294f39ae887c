"""The index of large traces: the same requests as from the file, at a cost that follows the window."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lambdascale.core import TraceError, UserError
from lambdascale.workload import AzureTrace, BurstGptTrace, LoadedTrace, index, scan
from lambdascale.workload.decoders import CsvDecoder, Names
from lambdascale.workload.readers import TimedTrace
from tests.unit.trace_files import AZURE, BURSTGPT, Write, azure_row

BEGIN = datetime(2024, 5, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Index every file, in small row groups and blocks, in a folder of the test."""
    monkeypatch.setenv("LAMBDASCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "INDEXED_BYTES", 0)
    monkeypatch.setattr(index, "_GROUP_ROWS", 100)
    monkeypatch.setattr(scan, "BLOCK_BYTES", 3000)
    return tmp_path / "cache" / "traces"


def rows(count: int, step_s: float = 1.0) -> str:
    return "".join(azure_row(f"{BEGIN + timedelta(seconds=i * step_s)}", 10 + i, 1 + i % 7) for i in range(count))


def load(workload: TimedTrace, monkeypatch: pytest.MonkeyPatch, *, indexed: bool) -> LoadedTrace:
    with monkeypatch.context() as patch:
        if not indexed:
            patch.setattr(index, "INDEXED_BYTES", 1 << 40)
        return workload.load(models=["a", "b"], seed=3)


class TestSameRequests:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"start_s": 100.0, "duration_s": 50.0},
            {"start_s": 99.5, "duration_s": 0.0},
            {"start_s": 5000.0},
            {"duration_s": 200.0, "repeat": 2, "rate_scale": 1.5, "popularity": "zipf"},
        ],
    )
    @pytest.mark.parametrize("backwards", [False, True])
    def test_azure(self, write: Write, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], backwards: bool) -> None:
        lines = rows(1000).splitlines(keepends=True)
        path = write(AZURE + "".join(lines[::-1] if backwards else lines))
        workload = AzureTrace(path=path, **settings)
        assert load(workload, monkeypatch, indexed=True) == load(workload, monkeypatch, indexed=False)

    def test_the_edges_of_a_window_are_exact(self, write: Write) -> None:
        """A float of nanoseconds since 1970 is exact to 256 of them."""
        times = [f"2024-05-12 00:00:0{at}.000000{100 * part}" for at in range(9) for part in range(1, 10)]
        path = write(AZURE + "".join(map(azure_row, times)))
        for part in range(9):
            found = AzureTrace(path=path, start_s=3.0 + (part - 0.5) * 1e-7, duration_s=4.0).requests(models=["m"], seed=0)
            assert len(found) == 36
            assert found[0].arrival_s == pytest.approx(5e-8, rel=0.1)

    @pytest.mark.parametrize(
        "settings",
        [
            {"failures": "drop"},
            {"failures": "count", "start_s": 40.0, "duration_s": 100.0},
            {"spread_within_second": True, "start_s": 40.0, "duration_s": 100.0},
            {"log_type": "kind 1"},
            {"model_column": "Model", "session_column": "Log Type", "start_s": 100.0},
        ],
    )
    def test_burstgpt(self, write: Write, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
        path = write(BURSTGPT + "".join(f"{t + 7},m{t % 2},{t % 5},{t % 3},9,kind {t % 4}\n" for t in range(900)))
        workload = BurstGptTrace(path=path, **settings)
        assert load(workload, monkeypatch, indexed=True) == load(workload, monkeypatch, indexed=False)


class TestCost:
    def test_a_window_reads_few_row_groups(self, write: Write) -> None:
        path = write(AZURE + rows(5000))
        workload = AzureTrace(path=path, start_s=2000.0, duration_s=50.0)
        assert len(workload.requests(models=["m"], seed=0)) == 50
        found = index.stored(path, "", workload._decoder(), workload._key(), skip=False)
        assert isinstance(found, index.Indexed)
        first = found.notes.served.first
        assert found.between(first + 2000 * 10**9, first + 2050 * 10**9).num_rows == 51
        assert found.groups_read <= 2

    def test_an_index_is_made_once(self, write: Write, monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
        workload = AzureTrace(path=write(AZURE + rows(300)), start_s=100.0)
        first = workload.load(models=["m"], seed=0)
        monkeypatch.setattr(index, "scan", None)
        assert workload.load(models=["m"], seed=0) == first
        assert len(list(small.iterdir())) == 1, "no drafts are left"

    def test_requests_are_counted_in_the_window(self, write: Write) -> None:
        workload = AzureTrace(path=write(AZURE + rows(1000)), duration_s=50.0)
        assert len(workload.load(models=["m"], seed=0, max_requests=400).requests) == 50


class TestChanges:
    def test_a_changed_trace_is_indexed_anew(self, write: Write, small: Path) -> None:
        path = write(AZURE + rows(300))
        assert len(AzureTrace(path=path).requests(models=["m"], seed=0)) == 300
        write(AZURE + rows(301))
        assert len(AzureTrace(path=path).requests(models=["m"], seed=0)) == 301
        assert len(list(small.iterdir())) == 1, "the older index is replaced"

    def test_the_same_size_at_another_time(self, write: Write) -> None:
        path = write(AZURE + rows(300))
        before = AzureTrace(path=path).load(models=["m"], seed=0)
        write(AZURE + rows(300).replace(",10,", ",99,"))
        os.utime(path, ns=(1, 1))
        after = AzureTrace(path=path).load(models=["m"], seed=0)
        assert before.provenance.sha256 != after.provenance.sha256
        assert after.requests[0].prompt_tokens == 99

    def test_each_reading_has_its_own_index(self, write: Write, small: Path) -> None:
        path = write(BURSTGPT + "".join(f"{t},m,5,5,10,kind {t % 2}\n" for t in range(300)))
        counts = [len(BurstGptTrace(path=path, log_type=kind).requests(models=["m"], seed=0)) for kind in (None, "kind 1", None)]
        assert counts == [300, 150, 300]
        assert len(list(small.iterdir())) == 2

    @pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 999])
    def test_a_damaged_index_is_made_anew(self, write: Write, small: Path, damage: Any) -> None:
        workload = AzureTrace(path=write(AZURE + rows(300)))
        first = workload.load(models=["m"], seed=0)
        (file,) = small.iterdir()
        file.write_bytes(damage(file.read_bytes()))
        assert workload.load(models=["m"], seed=0) == first

    def test_damaged_rows_are_an_error_that_names_the_index(self, write: Write, small: Path) -> None:
        workload = AzureTrace(path=write(AZURE + rows(300)))
        workload.load(models=["m"], seed=0)
        (file,) = small.iterdir()
        whole = file.read_bytes()
        file.write_bytes(whole[:4] + b"\xff" * 400 + whole[404:])
        with pytest.raises(UserError, match=rf"the index {file} of a trace is damaged, delete it"):
            workload.load(models=["m"], seed=0)

    def test_no_room(self, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("LAMBDASCALE_CACHE", str(tmp_path / "file"))
        with pytest.raises(UserError, match=r"cannot write the index of .*set LAMBDASCALE_CACHE to a folder"):
            AzureTrace(path=write(AZURE + rows(3))).requests(models=["m"], seed=0)


class TestMistakes:
    def test_lines_are_counted_over_blocks(self, write: Write, small: Path) -> None:
        path = write(AZURE + rows(700) + "x,1,1\n" + rows(100))
        with pytest.raises(TraceError, match=r"trace.csv:702: TIMESTAMP must look like .*\(workload.skip_bad_rows=true"):
            AzureTrace(path=path).requests(models=["m"], seed=0)
        assert not list(small.iterdir()), "a file that is refused leaves no index"
        loaded = AzureTrace(path=path, skip_bad_rows=True).load(models=["m"], seed=0)
        assert (len(loaded.requests), loaded.provenance.rows, loaded.provenance.skipped_rows) == (800, 801, 1)
        with pytest.raises(TraceError, match=r"trace.csv:702: TIMESTAMP must look like .*\(workload.skip_bad_rows=true"):
            AzureTrace(path=path).requests(models=["m"], seed=0)

    def test_a_request_without_tokens_outside_the_window(self, write: Write) -> None:
        path = write(AZURE + rows(700) + azure_row("2024-05-13 00:00:00", 0, 5))
        for _ in range(2):
            with pytest.raises(TraceError, match=r":702: a request of 0 prompt and 5 output tokens"):
                AzureTrace(path=path, duration_s=5.0).requests(models=["m"], seed=0)


CELLS = st.sampled_from(
    ("0", "5", "007", "1.5", "1e3", "12345678901234567", "999999999", "1000000000", "", " 3", "x", "3,4", "\u0663")
)
TIMES = st.datetimes(datetime(1969, 1, 1), datetime(2263, 1, 1)).map(str) | CELLS
ZONES = st.sampled_from(("", "Z", "+00:00", "+02:00", ".123456789Z", "+00:00Z", ".", "\r"))


LOG_TYPES = st.sampled_from(("x", " x ", "y", "\u00a0x"))
LINES = st.lists(st.tuples(st.tuples(TIMES, ZONES).map("".join), CELLS, CELLS, LOG_TYPES).map(",".join), max_size=4)


@example(lines=["2024-05-10 00:00:00Z,1,1,x"], unit="date")
@given(lines=LINES, unit=st.sampled_from(("s", "date")))
def test_both_ways_of_decoding_agree(lines: list[str], unit: Any) -> None:
    """A block has the same rows by columns and line by line; one with a mistake is left to the latter."""
    names = Names(time="t", prompt="p", output="o", model="k", keep={"k": "x"})
    decoder = CsvDecoder("file", unit, names)
    decoder.by_line(b"t,p,o,k\n", 1, skip=False)
    block = "\n".join(lines).encode()
    fast = decoder.fast(block)
    slow = decoder.by_line(block, 2, skip=True)
    if fast is not None:
        table, seen = fast
        assert (table.equals(slow.table), seen, slow.skipped) == (True, slow.seen, 0)


def test_ordinary_blocks_are_decoded_by_columns() -> None:
    decoder = CsvDecoder("file", "date", Names(time="TIMESTAMP", prompt="ContextTokens", output="GeneratedTokens"))
    decoder.by_line(AZURE.encode(), 1, skip=False)
    times = ("2023-11-16 18:15:46.6805900", "2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:00+00:00")
    for row in map(azure_row, times):
        found = decoder.fast(row.encode() * 3)
        assert found is not None, row
        assert isinstance(found[0], pa.Table)
        assert found[1] == 3
