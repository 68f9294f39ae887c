"""Trace readers: rows they accept and refuse, and the file and line named in errors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lambdascale.core import TraceError, UserError, traced
from lambdascale.workload import ArrivalsTrace, AzureTrace, BurstGptTrace, MooncakeTrace
from tests.unit.trace_files import AZURE, BURSTGPT, Write, azure_row, read


class TestAzure:
    def test_keeps_all_seven_decimals(self, write: Write) -> None:
        rows = azure_row("2023-11-16 18:15:46.6805900", 374, 44) + azure_row("2023-11-16 18:15:46.6805901", 396, 109)
        first, second = read(AzureTrace(path=write(AZURE + rows)))
        assert first == traced(0, 0.0, "m", 374, 44, 8192)
        assert second == traced(1, 1e-7, "m", 396, 109, 8192)

    def test_accepts_the_zones_of_2024_and_missing_fractions(self, write: Write) -> None:
        times = ["2024-05-10 00:00:00+00:00", "2024-05-10 00:00:00.5+00:00", "2024-05-10T02:00:01+02:00", "2024-05-10 00:00:02Z"]
        requests = read(AzureTrace(path=write(AZURE + "".join(map(azure_row, times)))))
        assert [r.arrival_s for r in requests] == [0.0, 0.5, 1.0, 2.0]

    def test_survives_mark_crlf_blank_lines_padding_and_no_final_newline(self, write: Write) -> None:
        header = "\ufeff TIMESTAMP , ContextTokens,GeneratedTokens,Extra\r\n"
        text = header + "2023-01-01 00:00:00, 7 ,8,x\r\n\r\n2023-01-01 00:00:01,9,1,\r\n \r\n"
        for content in (text, text.strip()):
            assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in read(AzureTrace(path=write(content)))] == [
                (0, 7, 8),
                (1, 9, 1),
            ]

    def test_finds_columns_by_name(self, write: Write) -> None:
        content = "GeneratedTokens,TIMESTAMP,ContextTokens\n3,2023-01-01 00:00:00,4\n"
        assert read(AzureTrace(path=write(content))) == [traced(0, 0.0, "m", 4, 3, 8192)]

    def test_dates_beyond_what_64_bits_of_nanoseconds_hold(self, write: Write) -> None:
        rows = azure_row("1970-01-01 00:00:00") + azure_row("2261-12-31 23:59:59")
        assert [r.arrival_s for r in read(AzureTrace(path=write(AZURE + rows)))] == [0.0, 9214646399.0]
        with pytest.raises(TraceError, match=":3: TIMESTAMP must be from 1970 to 2261, not '2262-01-01"):
            read(AzureTrace(path=write(AZURE + azure_row("2023-01-01 00:00:00") + azure_row("2262-01-01 00:00:00"))))

    def test_sorts_stably_and_counts_from_the_earliest_row(self, write: Write) -> None:
        rows = [azure_row(f"2023-01-01 00:00:0{s}", prompt) for prompt, s in [(1, 5), (2, 3), (3, 5), (4, 3)]]
        requests = read(AzureTrace(path=write(AZURE + "".join(rows))))
        assert [(r.request_id, r.arrival_s, r.prompt_tokens) for r in requests] == [(0, 0, 2), (1, 0, 4), (2, 2, 1), (3, 2, 3)]

    @pytest.mark.parametrize(
        ("row", "complaint"),
        [
            ("2023-01-01 00:00:00,5,-0", "GeneratedTokens must be a whole number of at most 9 digits, not '-0'"),
            ("2023-01-01 00:00:00,-5,5", "not '-5'"),
            ("2023-01-01 00:00:00,5.5,5", "not '5.5'"),
            ("2023-01-01 00:00:00,nan,5", "not 'nan'"),
            ("2023-01-01 00:00:00,1_0,5", "not '1_0'"),
            ("2023-01-01 00:00:00,٣,5", "not '٣'"),
            ("2023-01-01 00:00:00," + "9" * 5000 + ",5", "ContextTokens must be"),
            ("2023-01-01 00:00:00,,5", "not ''"),
            ("2023-01-01 00:00:00,5", "2 fields where the header has 3"),
            ("2023-01-01 00:00:00,5,5,5", "4 fields where the header has 3"),
            ("2023-13-01 00:00:00,5,5", "TIMESTAMP must look like"),
            ("2023-01-01 25:00:00,5,5", "TIMESTAMP must look like"),
            ("2023-01-01,5,5", "TIMESTAMP must look like"),
            ("nan,5,5", "TIMESTAMP must look like"),
            ('"2023-01-01 00:00:00,5,5', "TIMESTAMP must look like"),
            ("\x00\x01\x02", "1 fields"),
        ],
    )
    def test_names_file_and_line_of_a_bad_row(self, write: Write, row: str, complaint: str) -> None:
        good = azure_row("2023-01-01 00:00:00")
        path = write(AZURE + good + "\n" + row + "\n" + good)
        with pytest.raises(TraceError) as caught:
            read(AzureTrace(path=path))
        assert str(caught.value).startswith(f"{path}:4: ")
        assert complaint in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < len(path) + 200
        loaded = AzureTrace(path=path, skip_bad_rows=True).load(models=["m"], seed=0)
        assert len(loaded.requests) == 2
        assert (loaded.provenance.rows, loaded.provenance.skipped_rows) == (3, 1)

    def test_undecodable_bytes_are_a_bad_row(self, write: Write) -> None:
        path = write(AZURE.encode() + b"2023-01-01 00:00:00,\xff\xfe,5\n")
        with pytest.raises(TraceError, match=r"trace.csv:2: ContextTokens"):
            read(AzureTrace(path=path))

    @pytest.mark.parametrize("content", ["", "\n\n", AZURE, AZURE + "\n \n", "\ufeff"])
    def test_an_empty_trace_is_an_error_even_when_bad_rows_are_skipped(self, write: Write, content: str) -> None:
        for skip in (False, True):
            with pytest.raises(TraceError, match="the trace has no rows"):
                read(AzureTrace(path=write(content), skip_bad_rows=skip))

    def test_nothing_but_bad_rows_is_an_error_that_shows_the_first(self, write: Write) -> None:
        path = write(AZURE + "x,1,1\ny,1,1\n")
        with pytest.raises(TraceError, match=r"no usable row: 2 of 2 are malformed, the first at line 2: TIMESTAMP .* not 'x'"):
            read(AzureTrace(path=path, skip_bad_rows=True))

    def test_a_file_of_another_format_is_refused_whatever_is_skipped(self, write: Write) -> None:
        path = write(BURSTGPT + "1,ChatGPT,2,3,5,API log\n")
        with pytest.raises(
            TraceError, match=r"trace.csv:1: the header lacks TIMESTAMP, ContextTokens, GeneratedTokens; it reads 'Timestamp"
        ):
            read(AzureTrace(path=path, skip_bad_rows=True))

    def test_missing_paths(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"set workload.path=FILE \(python scripts/fetch_traces.py azure_2023_conv"):
            AzureTrace()
        with pytest.raises(TraceError, match=r"no-such.csv: no such file \(python scripts"):
            read(AzureTrace(path=str(tmp_path / "no-such.csv")))
        with pytest.raises(TraceError, match="not a file"):
            read(AzureTrace(path=str(tmp_path)))

    def test_a_home_directory_in_the_path(self, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(AZURE + azure_row("2023-01-01 00:00:00"), "mine.csv")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert len(read(AzureTrace(path="~/mine.csv"))) == 1

    def test_provenance_has_the_digest_of_the_bytes(self, write: Write) -> None:
        content = (AZURE + azure_row("2023-01-01 00:00:00")).encode()
        path = write(content)
        provenance = AzureTrace(path=path).load(models=["m"], seed=0).provenance
        assert provenance.sha256 == hashlib.sha256(content).hexdigest()
        assert provenance.source == path


class TestBurstGpt:
    ROWS = (
        "10,ChatGPT,472,18,490,Conversation log\n"
        "10,GPT-4,100,0,100,API log\n"
        "12,ChatGPT,5,6,11,API log\n"
        "12,GPT-4,7,8,15,Conversation log\n"
    )

    def test_drops_and_counts_failures(self, write: Write) -> None:
        loaded = BurstGptTrace(path=write(BURSTGPT + self.ROWS)).load(models=["m"], seed=0)
        assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in loaded.requests] == [(0, 472, 18), (2, 5, 6), (2, 7, 8)]
        assert (loaded.provenance.rows, loaded.provenance.dropped_failures, loaded.provenance.skipped_rows) == (4, 1, 0)

    def test_log_type(self, write: Write) -> None:
        path = write(BURSTGPT + self.ROWS)
        requests = read(BurstGptTrace(path=path, log_type="Conversation log"))
        assert [r.prompt_tokens for r in requests] == [472, 7]
        with pytest.raises(TraceError, match="none of the 4 rows is left"):
            read(BurstGptTrace(path=path, log_type="api"))

    def test_filtered_rows_are_still_checked(self, write: Write) -> None:
        path = write(BURSTGPT + self.ROWS + "13,GPT-4,x,8,15,API log\n")
        with pytest.raises(TraceError, match=":6: Request tokens"):
            read(BurstGptTrace(path=path, log_type="Conversation log"))

    def test_models_of_the_trace(self, write: Write) -> None:
        workload = BurstGptTrace(path=write(BURSTGPT + self.ROWS), model_column="Model", popularity="zipf")
        assert [r.model for r in read(workload, "a", "b", "c")] == ["a", "a", "b"]
        with pytest.raises(UserError, match=r"the trace names 2 models \(ChatGPT, GPT-4\), the run has 1"):
            read(workload, "a")

    def test_models_do_not_depend_on_the_window(self, write: Write) -> None:
        content = BURSTGPT + "0,ChatGPT,1,1,2,x\n5,GPT-4,1,1,2,x\n"
        workload = BurstGptTrace(path=write(content), model_column="Model", start_s=5)
        assert [r.model for r in read(workload, "a", "b")] == ["b"]

    def test_spreads_within_the_second(self, write: Write) -> None:
        path = write(BURSTGPT + "3,x,1,1,2,y\n" * 300 + "4,x,2,1,3,y\n" * 300)
        plain, spread = (
            read(BurstGptTrace(path=path, check_units=False, spread_within_second=spread)) for spread in (False, True)
        )
        assert {r.arrival_s for r in plain} == {0.0, 1.0}
        assert len({r.arrival_s for r in spread}) == 600
        assert spread[0].arrival_s == 0.0
        assert all(r.prompt_tokens == 1 for r in spread[:300])
        assert 1.9 < spread[-1].arrival_s < 2.0


class TestMooncake:
    def test_milliseconds(self, write: Write) -> None:
        lines = [{"timestamp": t, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]} for t in (27482, 30535)]
        requests = read(MooncakeTrace(path=write("\n".join(map(json.dumps, lines)) + "\n\n")))
        assert requests == [traced(0, 0.0, "m", 6955, 52, 8192), traced(1, 3.053, "m", 6955, 52, 8192)]

    @pytest.mark.parametrize(
        "row",
        [
            '{"timestamp": 1, "input_length": 5}',
            '{"timestamp": NaN, "input_length": 5, "output_length": 5}',
            '{"timestamp": -1, "input_length": 5, "output_length": 5}',
            '{"timestamp": 1, "input_length": true, "output_length": 5}',
            '{"timestamp": 1, "input_length": "5", "output_length": 5}',
            '{"timestamp": 1, "input_length": 5.5, "output_length": 5}',
            '{"timestamp": 1, "input_length": 99999999999, "output_length": 5}',
            '{"timestamp": 1e999, "input_length": 5, "output_length": 5}',
            "[1, 2, 3]",
            "{",
        ],
    )
    def test_bad_rows(self, write: Write, row: str) -> None:
        good = '{"timestamp": 0, "input_length": 5, "output_length": 5}\n'
        path = write(good + row + "\n" + good)
        with pytest.raises(TraceError, match=r"trace.csv:2: ") as caught:
            read(MooncakeTrace(path=path))
        assert "\n" not in str(caught.value)
        assert len(read(MooncakeTrace(path=path, skip_bad_rows=True))) == 2


class TestArrivals:
    def test_comments_and_order(self, write: Write) -> None:
        content = "# header\n7.5 # late\n\n  5\n5.5\n#\n"
        assert [r.arrival_s for r in read(ArrivalsTrace(path=write(content)))] == [0.0, 0.5, 2.5]

    def test_batches_share_an_arrival(self, write: Write) -> None:
        workload = ArrivalsTrace(path=write("0\n1\n"), requests_per_arrival=4, prompt_tokens=9, output_tokens=64)
        requests = read(workload)
        assert [r.arrival_s for r in requests] == [0.0] * 4 + [1.0] * 4
        assert {(r.prompt_tokens, r.output_tokens) for r in requests} == {(9, 64)}
        assert [r.request_id for r in requests] == list(range(8))

    @pytest.mark.parametrize("row", ["1 2", "1,2", "-1", "inf", "nan", "1_0", "soon", "0x10"])
    def test_bad_rows(self, write: Write, row: str) -> None:
        with pytest.raises(TraceError, match=r":3: an arrival time must be a number of at least 0"):
            read(ArrivalsTrace(path=write(f"# times\n1\n{row}\n")))

    def test_a_single_arrival(self, write: Write) -> None:
        assert [r.arrival_s for r in read(ArrivalsTrace(path=write("1e3")))] == [0.0]

    @pytest.mark.parametrize(
        "field", [{"requests_per_arrival": 0}, {"prompt_tokens": 0}, {"output_tokens": -1}, {"start_s": -1.0}]
    )
    def test_settings_out_of_range(self, field: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=next(iter(field))):
            ArrivalsTrace(path="x", **field)

    @pytest.mark.parametrize("field", [{"path": 3}, {"requests_per_arrival": 2.0}, {"skip_bad_rows": 1}, {"lengths": "zipf"}])
    def test_settings_of_the_wrong_type(self, field: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=next(iter(field))):
            ArrivalsTrace(**{"path": "x", **field})
