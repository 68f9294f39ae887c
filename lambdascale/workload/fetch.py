"""Download public request traces, each verified by its SHA-256; the script is scripts/fetch_traces.py."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests

from lambdascale.core import UserError
from lambdascale.core.text import one_line

LOCK_NAME = "traces.lock.json"
_TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class TraceSource:
    """A file to download. ``sha256`` None: upstream publishes no digest, so the first download pins its own.

    ``saved_as``: the local file name, for files whose upstream name is not descriptive.
    """

    url: str
    sha256: str | None
    licence: str
    about: str
    saved_as: str = ""

    @property
    def filename(self) -> str:
        """Local file name: ``saved_as``, or else the last part of the URL."""
        return self.saved_as or self.url.rsplit("/", 1)[-1]


_AZURE_2023 = "https://raw.githubusercontent.com/Azure/AzurePublicDataset/790921015d50dd6aae7f7e47f39ba0e235ad6b08/data"
_AZURE_2024 = "https://azurepublicdatasettraces.blob.core.windows.net/azurellminfererencetrace"
_AZURE_LICENCE = "CC-BY-4.0, Microsoft (Azure/AzurePublicDataset)"
_BURSTGPT = "https://media.githubusercontent.com/media/HPMLL/BurstGPT"
_BURSTGPT_LICENCE = "CC-BY-4.0, Wang et al. (HPMLL/BurstGPT)"
_BURSTGPT_3 = "https://github.com/HPMLL/BurstGPT/releases/download/v2.0/BurstGPT_3.csv"
_BAILIAN = "https://media.githubusercontent.com/media/alibaba-edu/qwen-bailian-usagetraces-anon/main"
_BAILIAN_LICENCE = "Apache-2.0, Alibaba (alibaba-edu/qwen-bailian-usagetraces-anon)"
_FUNCTIONS_2019 = "https://azurecloudpublicdataset2.blob.core.windows.net/azurepublicdatasetv2/azurefunctions_dataset2019"
_FUNCTIONS_2021 = "https://github.com/Azure/AzurePublicDataset/raw/master/data"
_MOONCAKE = "https://raw.githubusercontent.com/kvcache-ai/Mooncake/main/FAST25-release/traces"
_MOONCAKE_LICENCE = "Apache-2.0, Moonshot AI (kvcache-ai/Mooncake)"
_AUTHORS = "https://raw.githubusercontent.com/lambda-scale/lambda-scale/9db210fcb6979f7c1f73f9819a77e0edb6c5e343/lambda-scale"
_AUTHORS_LICENCE = "MIT (lambda-scale/lambda-scale)"

#: BurstGPT's digests are those of its repository's Git LFS pointers, at the commits in the URLs; the third part's is one that
#: others published.
REGISTRY: Mapping[str, TraceSource] = {
    "lambdascale_30min": TraceSource(
        url=f"{_AUTHORS}/test/trace_0.txt",
        sha256=None,
        licence=_AUTHORS_LICENCE,
        about="the λScale authors' 30-minute trace, 498 arrivals; read by workload=arrivals",
        saved_as="lambdascale_30min_arrivals.txt",
    ),
    "lambdascale_rates": TraceSource(
        url=f"{_AUTHORS}/workload/Burst.txt",
        sha256=None,
        licence=_AUTHORS_LICENCE + ", from BurstGPT (CC-BY-4.0)",
        about="a BurstGPT rate series of 1,007 bins; read by workload=rate_series",
        saved_as="burstgpt_rate_series.txt",
    ),
    "azure_2023_conv": TraceSource(
        url=f"{_AZURE_2023}/AzureLLMInferenceTrace_conv.csv",
        sha256="2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        licence=_AZURE_LICENCE,
        about="conversation, 19,366 requests in an hour (0.7 MB); read by workload=azure",
    ),
    "azure_2023_code": TraceSource(
        url=f"{_AZURE_2023}/AzureLLMInferenceTrace_code.csv",
        sha256=None,
        licence=_AZURE_LICENCE,
        about="code completion, an hour (0.3 MB); read by workload=azure",
    ),
    "azure_2024_conv": TraceSource(
        url=f"{_AZURE_2024}/AzureLLMInferenceTrace_conv_1week.csv",
        sha256=None,
        licence=_AZURE_LICENCE,
        about="conversation, a week (large); read by workload=azure",
    ),
    "azure_2024_code": TraceSource(
        url=f"{_AZURE_2024}/AzureLLMInferenceTrace_code_1week.csv",
        sha256=None,
        licence=_AZURE_LICENCE,
        about="code completion, a week (large); read by workload=azure",
    ),
    "burstgpt_1": TraceSource(
        url=f"{_BURSTGPT}/5d93d820d9b6bee4e26914df003e5713538164ae/data/BurstGPT_without_fails_1.csv",
        sha256="a4d068a7113ec0290e74063a1b3447dc6001a30e4298eb313581b71006dda1f4",
        licence=_BURSTGPT_LICENCE,
        about="first two months, failures removed, 1.4 M requests (51 MB); read by workload=burstgpt",
    ),
    "burstgpt_2": TraceSource(
        url=f"{_BURSTGPT}/1f52bc81aab7392cc30cc10b244396d9480b245d/data/BurstGPT_without_fails_2.csv",
        sha256="56193aa9b2bb26128ded43d2d29a960df6bf5af062bcfc9b005f3fcaa4e6e501",
        licence=_BURSTGPT_LICENCE,
        about="second two months, failures removed, 3.8 M requests (142 MB); read by workload=burstgpt",
    ),
    "burstgpt_3": TraceSource(
        url=_BURSTGPT_3,
        sha256="2299986a07388aa303ec2c41d1131e756db650a39ed6ef9dfe7cc3d7f9a43b8f",
        licence=_BURSTGPT_LICENCE,
        about="third part, with sessions and failures, 5.3 M requests (232 MB); read by workload=burstgpt_sessions",
    ),
    **{
        f"bailian_{kind}": TraceSource(
            url=f"{_BAILIAN}/qwen_trace{part}_blksz_16.jsonl",
            sha256=None,
            licence=_BAILIAN_LICENCE,
            about=f"Qwen on Bailian, {about}, two hours; read by workload=bailian",
        )
        for kind, part, about in (("chat", "A", "users' chats"), ("api", "B", "calls of programs"))
    },
    "functions_2019": TraceSource(
        url=f"{_FUNCTIONS_2019}/azurefunctions-dataset2019.tar.xz",
        sha256=None,
        licence=_AZURE_LICENCE,
        about="Azure Functions, 14 days of 2019, an archive: unpack it; its days are read by workload=functions_2019",
    ),
    "functions_2021": TraceSource(
        url=f"{_FUNCTIONS_2021}/AzureFunctionsInvocationTraceForTwoWeeksJan2021.rar",
        sha256=None,
        licence=_AZURE_LICENCE,
        about="Azure Functions, two weeks of 2021, an archive: unpack it; read by workload=functions_2021",
    ),
    **{
        f"mooncake_{kind}": TraceSource(
            url=f"{_MOONCAKE}/{kind}_trace.jsonl",
            sha256=None,
            licence=_MOONCAKE_LICENCE,
            about=f"{kind}, FAST'25 release; read by workload=mooncake",
        )
        for kind in ("conversation", "toolagent", "synthetic")
    },
}


def fetch(name: str, out: Path, registry: Mapping[str, TraceSource] = REGISTRY) -> Path:
    """Download the trace ``name`` into the folder ``out``, unless an intact copy exists; return its path.

    The file appears under its name only when complete and verified. The first download of a trace without a known SHA-256 pins
    its digest in ``out``/traces.lock.json; later ones are verified against that. UserError for an unknown name, a failed
    download or a wrong digest.
    """
    if name not in registry:
        raise UserError(f"unknown trace {name!r}; choose from {', '.join(registry)}")
    source = registry[name]
    pins = _read_pins(out / LOCK_NAME)
    expected = source.sha256 or pins.get(source.url)
    path = _retrieve(source, expected, out)
    if expected is None:
        pins[source.url] = pooch.file_hash(str(path), alg="sha256")
        _write_pins(out / LOCK_NAME, pins)
    return path


def _retrieve(source: TraceSource, expected: str | None, out: Path) -> Path:
    pooch.get_logger().setLevel(logging.WARNING)
    if expected is None and (out / source.filename).exists():
        # A file copied here by hand proves nothing about upstream, so its digest must not become the pin.
        raise UserError(f"{out / source.filename} exists without a recorded SHA-256; move it away to download the trace")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    try:
        found = pooch.retrieve(
            source.url,
            known_hash=expected and f"sha256:{expected}",
            fname=source.filename,
            path=out,
            downloader=pooch.HTTPDownloader(timeout=_TIMEOUT_S),
        )
    except OSError as error:
        _close_response(error)
        raise UserError(f"cannot download {source.url}: {one_line(str(error)) or type(error).__name__}") from error
    except ValueError as error:
        raise UserError(f"{source.url} does not have the expected SHA-256 {expected}; the download was discarded") from error
    return Path(found)


def _close_response(error: Exception) -> None:
    # pooch streams downloads and leaves the connection of a refused request open.
    if isinstance(error, requests.RequestException) and error.response is not None:
        error.response.close()


def _read_pins(lock: Path) -> dict[str, str]:
    if not lock.exists():
        return {}
    try:
        pins = json.loads(lock.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{lock} is not JSON; delete it to pin downloads afresh") from error
    if not isinstance(pins, dict):
        raise UserError(f"{lock} must map URLs to SHA-256 digests; delete it to pin downloads afresh")
    return pins


def _write_pins(lock: Path, pins: Mapping[str, str]) -> None:
    draft = lock.with_suffix(".tmp")
    draft.write_text(json.dumps(pins, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(draft, lock)


def describe(name: str, source: TraceSource) -> str:
    """Describe a trace before its download in four lines: contents, URL, SHA-256 and licence."""
    digest = source.sha256 or f"unknown: the first download pins it in {LOCK_NAME}"
    return f"{name}: {source.about}\n  {source.url}\n  SHA-256 {digest}\n  licence {source.licence}"


def main(arguments: Sequence[str] | None = None, registry: Mapping[str, TraceSource] = REGISTRY) -> None:
    """Run the command line: names of traces to download, ``--list``, ``--out DIR``. Raises UserError for a user's mistake."""
    parser = argparse.ArgumentParser(prog="fetch_traces.py", description="Download public request traces, verified by SHA-256.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="traces to download; see --list")
    parser.add_argument("--list", action="store_true", help="show every trace with URL, SHA-256 and licence")
    parser.add_argument("--out", type=Path, default=Path("data/traces"), metavar="DIR", help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(describe(name, source) for name, source in registry.items()))
    elif not options.names:
        raise UserError(f"name at least one trace: {', '.join(registry)}")
    if unknown := [name for name in options.names if name not in registry]:
        raise UserError(f"unknown trace {unknown[0]!r}; choose from {', '.join(registry)}")
    for name in options.names:
        print(describe(name, registry[name]))
        path = fetch(name, options.out, registry)
        print(f"  saved as {path}, SHA-256 {pooch.file_hash(str(path), alg='sha256')}")
