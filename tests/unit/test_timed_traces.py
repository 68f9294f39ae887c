"""Timed traces by their options: columns, units, blocks, sessions, and requests without tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, ClassVar

import pytest

from lambdascale.core import TraceError, UserError, traced
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.workload import AzureTrace, BurstGptTrace, MooncakeTrace, TimedTrace
from tests.unit.trace_files import AZURE, BURSTGPT, Write, azure_row, read


class TestWithoutTokens:
    """Requests without tokens, in whichever column: refused, left out and counted, or served with one token."""

    FILES: ClassVar = {
        AzureTrace: AZURE + azure_row("2023-01-01 00:00:00", 0, 5) + azure_row("2023-01-01 00:00:01", 5, 5),
        BurstGptTrace: BURSTGPT + "0,x,0,5,5,y\n1,x,5,5,10,y\n",
        MooncakeTrace: "".join(
            json.dumps({"timestamp": t, "input_length": i, "output_length": 5}) + "\n" for t, i in ((0, 0), (1000, 5))
        ),
    }

    @pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.__name__)
    def test_by_option(self, write: Write, kind: type[Any]) -> None:
        path = write(self.FILES[kind])
        with pytest.raises(TraceError, match=r"trace.csv:\d: a request of 0 prompt and 5 output tokens .*failures=drop leaves"):
            read(kind(path=path, failures="refuse"))
        dropped = kind(path=path, failures="drop").load(models=["m"], seed=0)
        assert [(r.arrival_s, r.prompt_tokens) for r in dropped.requests] == [(0.0, 5)]
        assert (dropped.provenance.dropped_failures, dropped.failed) == (1, ())
        counted = kind(path=path, failures="count").load(models=["m"], seed=0)
        assert [(r.request_id, r.arrival_s, r.prompt_tokens) for r in counted.requests] == [(0, 1.0, 5)]
        assert [(r.request_id, r.arrival_s, r.prompt_tokens) for r in counted.failed] == [(1, 0.0, 0)]
        assert counted.provenance.dropped_failures == 0
        with pytest.raises(UserError, match="failures"):
            kind(path=path, failures="x")

    @pytest.mark.parametrize("tokens", ["0,0,0", "5,0,5", "0,5,5"])
    def test_whichever_column_is_zero(self, write: Write, tokens: str) -> None:
        path = write(BURSTGPT + f"0,x,{tokens},y\n1,x,5,5,10,y\n")
        loaded = BurstGptTrace(path=path).load(models=["m"], seed=0)
        assert (len(loaded.requests), loaded.provenance.dropped_failures) == (1, 1)
        prompt, output, _ = tokens.split(",")
        with pytest.raises(TraceError, match=rf":2: a request of {prompt} prompt and {output} output tokens"):
            read(BurstGptTrace(path=path, failures="refuse"))

    def test_failed_requests_are_rescaled_with_the_others(self, write: Write) -> None:
        path = write(BURSTGPT + "0,x,5,5,10,y\n10,x,7,0,7,y\n20,x,5,5,10,y\n")
        loaded = BurstGptTrace(path=path, failures="count", repeat=2, time_compression=10).load(models=["m"], seed=0)
        assert [r.arrival_s for r in loaded.requests] == [0, 2, 3, 5]
        assert [(r.request_id, r.arrival_s, r.prompt_tokens) for r in loaded.failed] == [(4, 1, 7), (5, 4, 7)]

    def test_nothing_but_failures(self, write: Write) -> None:
        path = write(BURSTGPT + "0,x,5,0,5,y\n")
        with pytest.raises(TraceError, match="none of the 1 rows is left"):
            read(BurstGptTrace(path=path))
        assert len(BurstGptTrace(path=path, failures="count").load(models=["m"], seed=0).failed) == 1


class TestUnits:
    @staticmethod
    def lines(times: Iterable[float]) -> str:
        return "".join(json.dumps({"timestamp": t, "input_length": 5, "output_length": 5}) + "\n" for t in times)

    @pytest.mark.parametrize(
        ("times", "sign"), [(range(0, 7200, 60), "120 requests span 7.14 s"), ([0, 0.5, 200_000], "it has fractions")]
    )
    def test_seconds_read_as_milliseconds(self, write: Write, times: Iterable[float], sign: str) -> None:
        path = write(self.lines(times))
        with pytest.raises(TraceError, match=rf"read as milliseconds, and .*{sign}.*check_units=false"):
            read(MooncakeTrace(path=path))
        assert read(MooncakeTrace(path=path, check_units=False))

    @pytest.mark.parametrize("times", [range(100), range(0, 60_600, 600)])
    def test_what_may_be_right(self, write: Write, times: Iterable[float]) -> None:
        assert read(MooncakeTrace(path=write(self.lines(times))))

    def test_short_sessions(self, write: Write) -> None:
        """Times within sessions are short however long the trace is."""
        requests = [{"t": at, "in": 5, "out": 5} for at in (0.0, 1.5, 30.0)]
        path = write(TestTimedTrace.json_lines({"id": str(at), "requests": requests} for at in range(60)))
        assert len(read(TestTimedTrace.preset("weka", path))) == 180

    def test_a_dense_trace_in_seconds(self, write: Write) -> None:
        path = write(BURSTGPT + "".join(f"{at},x,5,5,10,y\n" for at in range(50)) * 3)
        with pytest.raises(TraceError, match="read as seconds, and its 150 requests span 49 s"):
            read(BurstGptTrace(path=path))


class TestTimedTrace:
    """Columns, units and blocks by option, and the presets that are no class of their own."""

    BAILIAN = (
        {"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 40, "output_length": 7, "hash_ids": [1, 2, 3]},
        {"chat_id": 2, "parent_chat_id": -1, "timestamp": 62.5, "input_length": 16, "output_length": 3, "hash_ids": [9]},
        {"chat_id": 5, "parent_chat_id": 1, "timestamp": 70.0, "input_length": 64, "output_length": 9, "hash_ids": [1, 2, 3, 4]},
        {"chat_id": 7, "parent_chat_id": 5, "timestamp": 99.0, "input_length": 90, "output_length": 1, "hash_ids": [1] * 6},
    )

    @staticmethod
    def preset(name: str, path: str, *overrides: str) -> Any:
        return build(compose([f"workload={name}", f"workload.path={path}", *overrides])).workload

    @staticmethod
    def json_lines(rows: Iterable[Any]) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    def test_bailian_is_in_seconds_and_chats_are_sessions(self, write: Write) -> None:
        requests = read(self.preset("bailian", write(self.json_lines(self.BAILIAN))))
        assert [r.arrival_s for r in requests] == pytest.approx([0, 1.386, 8.886, 37.886])
        assert [r.session for r in requests] == ["1", "2", "1", "1"]

    def test_a_bailian_file_read_as_mooncakes(self, write: Write) -> None:
        """The case that was tried: 7,200 s were replayed in 7.2 without a word."""
        rows = [self.BAILIAN[0] | {"timestamp": float(t), "chat_id": t} for t in range(0, 7200, 40)]
        path = write(self.json_lines(rows))
        with pytest.raises(TraceError, match=r"read as milliseconds, and its 180 requests span 7.16 s: .*workload.time_unit"):
            read(MooncakeTrace(path=path))
        assert read(self.preset("bailian", path))[-1].arrival_s == 7160.0

    def test_blocks_of_another_size(self, write: Write) -> None:
        rows = [self.BAILIAN[3] | {"timestamp": 1000 * t, "input_length": 1600, "hash_ids": [1] * 100} for t in range(120)]
        path = write(self.json_lines(rows))
        with pytest.raises(TraceError, match="a hash covers 16 tokens on average, not the 512 of a block"):
            read(MooncakeTrace(path=path))
        assert (
            len(read(MooncakeTrace(path=path, block_tokens=16))) == len(read(MooncakeTrace(path=path, block_tokens=None))) == 120
        )
        few = [self.BAILIAN[3] | {"timestamp": 1000 * t, "input_length": 5120, "hash_ids": [1] * 10} for t in range(120)]
        with pytest.raises(TraceError, match="a hash covers 512 tokens on average, not the 16"):
            read(self.preset("bailian", write(self.json_lines(few))))
        short = [self.BAILIAN[3] | {"timestamp": 1000 * t, "input_length": 20, "hash_ids": [1]} for t in range(120)]
        assert len(read(MooncakeTrace(path=write(self.json_lines(short))))) == 120

    def test_sessions_of_agents(self, write: Write) -> None:
        inner = {"t": 5.0, "type": "subagent", "agent_id": "x", "requests": [{"t": 1.5, "in": 9, "out": 2, "hash_ids": []}]}
        first = {
            "id": "a",
            "block_size": 64,
            "requests": [{"t": 0.0, "type": "s", "in": 100, "out": 5, "hash_ids": [1]}, inner, {"t": 8.0, "in": 7, "out": 1}],
        }
        second = {"id": "b", "requests": [{"t": 0.0, "in": 3, "out": 4}]}
        path = write(self.json_lines([first, second]))
        together = read(self.preset("weka", path, "workload.session_gap_s=0"))
        assert [(r.session, r.arrival_s, r.prompt_tokens) for r in together] == [
            ("a", 0.0, 100),
            ("b", 0.0, 3),
            ("a", 6.5, 9),
            ("a", 8.0, 7),
        ]
        apart = read(self.preset("weka", path))
        begin = next(r.arrival_s for r in apart if r.session == "b")
        assert begin > 0
        assert [r.arrival_s for r in apart if r.session == "a"] == pytest.approx([0.0, 6.5, 8.0])

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ('{"id": "a"}', "missing required field `requests`"),
            ('{"id": "a", "requests": [{"t": 0, "in": 5}]}', "an entry of requests lacks t, in or out"),
            ('{"id": "a", "requests": [{"t": 0, "requests": [{"t": "x"}]}]}', "in requests of an entry"),
            ('{"id": "a", "requests": [{"t": -1, "in": 5, "out": 5}]}', ">= 0"),
        ],
    )
    def test_bad_sessions(self, write: Write, line: str, complaint: str) -> None:
        path = write('{"id": "a", "requests": [{"t": 0, "in": 5, "out": 5}]}\n' + line)
        with pytest.raises(TraceError, match=r":2: ") as caught:
            read(self.preset("weka", path))
        assert complaint in str(caught.value)

    def test_a_session_has_one_model(self, write: Write) -> None:
        rows = [{"timestamp": t, "input_length": 5, "output_length": 5, "who": str(t % 7)} for t in range(70)]
        workload = TimedTrace(path=write(self.json_lines(rows)), session_column="who", popularity="zipf", zipf_exponent=0.0)
        requests = read(workload, "a", "b", "c")
        assert len({(r.session, r.model) for r in requests}) == 7
        assert len({r.model for r in requests}) > 1

    def test_requests_without_a_session_choose_for_themselves(self, write: Write) -> None:
        rows = [{"timestamp": t, "input_length": 5, "output_length": 5, "who": ""} for t in range(40)]
        workload = TimedTrace(path=write(self.json_lines(rows)), session_column="who", popularity="zipf", zipf_exponent=0.0)
        assert {(r.session, r.model) for r in read(workload, "a", "b")} == {(None, "a"), (None, "b")}

    def test_any_columns_and_units(self, write: Write) -> None:
        path = write("when,in,out,who\n2500,5,6,m2\n1000,7,8,m1\n", "x.csv")
        columns = {"format": "csv", "time_column": "when", "prompt_column": "in", "output_column": "out", "hash_column": None}
        workload = TimedTrace(path=path, time_unit="ms", model_column="who", **columns)
        assert read(workload, "a", "b") == [traced(0, 0.0, "a", 7, 8, 8192), traced(1, 1.5, "b", 5, 6, 8192)]
        dated = write('{"timestamp": "2024-05-10 00:00:01.5", "input_length": 1, "output_length": 2}', "y.jsonl")
        assert len(read(TimedTrace(path=dated, time_unit="date"))) == 1
        with pytest.raises(TraceError, match=r"y.jsonl:1: Expected `float`, got `str`"):
            read(TimedTrace(path=dated))

    def test_csv_read_as_json_lines(self, write: Write) -> None:
        with pytest.raises(TraceError, match=r":1: .*, in 'when,in,out' \(workload.format=csv reads CSV\)"):
            read(TimedTrace(path=write("when,in,out\n1,2,3\n")))

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"format": "csv"}, r"hash_column needs format=jsonl, not csv: set workload\.hash_column=null"),
            ({"block_tokens": 16, "hash_column": None}, "block_tokens needs a hash_column"),
            ({"parent_column": "p"}, "parent_column needs a session_column"),
            ({"rows_column": "requests"}, "belong together"),
            ({"session_gap_s": 1.0}, "belong together"),
            ({"rows_column": "requests", "session_gap_s": 1.0, "time_unit": "ms"}, "needs time_unit=s"),
            ({"prompt_column": "output_length"}, "different names of columns"),
            ({"model_column": ""}, "different names of columns"),
            ({"session_column": "a\nb"}, "control characters"),
            ({"time_column": '"when"'}, "quotes"),
            ({"time_unit": "h"}, "time_unit"),
            ({"max_output_tokens": None}, "does not record the limits"),
        ],
    )
    def test_settings_that_contradict(self, settings: dict[str, Any], complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            TimedTrace(path="x", **settings)


class TestColumnsThatAreNotModelled:
    """Azure's multimodal trace of 2025; and closed sessions, whose later requests have a delay in the place of a time."""

    def test_images(self, write: Write) -> None:
        path = write("TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:01.5+00:00,2,700,30\n")
        with pytest.raises(TraceError, match=r"csv:1: the trace has NumImages: images are not modelled \(workload.images=ignore"):
            read(AzureTrace(path=path))
        assert [(r.prompt_tokens, r.output_tokens) for r in read(AzureTrace(path=path, images="ignore"))] == [(700, 30)]
        with pytest.raises(UserError, match="images"):
            AzureTrace(path=path, images="draw")  # type: ignore[arg-type]  # the mistake

    @pytest.mark.parametrize("kind", [MooncakeTrace, TimedTrace])
    def test_closed_sessions(self, write: Write, kind: type[TimedTrace]) -> None:
        row = {"session_id": "s", "input_length": 5, "output_length": 5}
        path = write(TestTimedTrace.json_lines([row | {"timestamp": 0}, {"delay": 100} | row]))
        with pytest.raises(TraceError, match=r"csv:2: Object missing required field `timestamp`, in .*delay"):
            read(kind(path=path))


class TestBurstGptSessions:
    HEADER = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    ROWS = (
        "19440110.0,u-1,43,GPT-4,906,446,1352,Conversation log\n"
        "19440161.0,,2,ChatGPT,5,6,11,API log\n"
        "19440170.0,u-1,3,GPT-4,7,8,15,Conversation log\n"
    )

    def test_version_1_2(self, write: Write) -> None:
        path = write(self.HEADER + self.ROWS)
        assert [(r.arrival_s, r.prompt_tokens) for r in read(BurstGptTrace(path=path))] == [(0, 906), (51, 5), (60, 7)]
        requests = read(TestTimedTrace.preset("burstgpt_sessions", path))
        assert [r.session for r in requests] == ["u-1", None, "u-1"]

    def test_a_file_without_sessions(self, write: Write) -> None:
        path = write(BURSTGPT + "5,ChatGPT,472,18,490,API log\n")
        with pytest.raises(TraceError, match=":1: the header lacks Session ID"):
            read(TestTimedTrace.preset("burstgpt_sessions", path))
