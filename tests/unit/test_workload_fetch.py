"""The trace downloader against a loopback server that sends wrong bytes, stalls and closes connections early."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lambdascale.core import UserError
from lambdascale.workload.fetch import LOCK_NAME, REGISTRY, TraceSource, fetch, main

ROOT = Path(__file__).resolve().parents[2]
CONTENT = b"0.0\n1.0\n"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Upstream(BaseHTTPRequestHandler):
    """Serves ``content`` at /trace.txt, closes half-way through /short.txt, and answers 404 otherwise."""

    content = CONTENT
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        if self.path not in ("/trace.txt", "/short.txt"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: 3 if self.path == "/short.txt" else None])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Upstream, "content", CONTENT)
    monkeypatch.setattr(Upstream, "asked", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Upstream) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def registry(url: str, sha256: str | None) -> dict[str, TraceSource]:
    return {"it": TraceSource(url=url, sha256=sha256, licence="CC0", about="a test")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_verified_download_is_kept_and_not_repeated(upstream: str, tmp_path: Path) -> None:
    sources = registry(f"{upstream}/trace.txt", DIGEST)
    path = fetch("it", tmp_path / "new" / "folder", sources)
    assert path.read_bytes() == CONTENT
    assert fetch("it", path.parent, sources) == path
    assert Upstream.asked == 1
    assert names(path.parent) == ["trace.txt"]


def test_a_damaged_file_is_downloaded_again(upstream: str, tmp_path: Path) -> None:
    sources = registry(f"{upstream}/trace.txt", DIGEST)
    path = fetch("it", tmp_path, sources)
    path.write_text("damaged")
    assert fetch("it", tmp_path, sources).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("page", "complaint"), [("trace.txt", "does not have the expected SHA-256"), ("short.txt", "cannot download"), ("x", "404")]
)
def test_a_bad_download_leaves_nothing(upstream: str, tmp_path: Path, page: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        fetch("it", tmp_path, registry(f"{upstream}/{page}", "0" * 64))
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_broken_download_without_digest_leaves_nothing_either(upstream: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot download"):
        fetch("it", tmp_path, registry(f"{upstream}/short.txt", None))
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written(upstream: str, tmp_path: Path) -> None:
    """The folder is named, not the server: nothing was asked of that."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        fetch("it", tmp_path / "file" / "x", registry(f"{upstream}/trace.txt", DIGEST))


def test_no_server(upstream: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot download"):
        fetch("it", tmp_path, registry("http://127.0.0.1:1/trace.txt", DIGEST))


def test_an_unknown_digest_is_pinned_on_first_sight(upstream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = registry(f"{upstream}/trace.txt", None)
    path = fetch("it", tmp_path, sources)
    assert json.loads((tmp_path / LOCK_NAME).read_text()) == {f"{upstream}/trace.txt": DIGEST}
    path.unlink()
    monkeypatch.setattr(Upstream, "content", b"something else")
    with pytest.raises(UserError, match=f"expected SHA-256 {DIGEST}"):
        fetch("it", tmp_path, sources)
    assert names(tmp_path) == [LOCK_NAME]


def test_a_file_put_there_by_hand_is_neither_pinned_nor_lost(upstream: str, tmp_path: Path) -> None:
    (tmp_path / "trace.txt").write_text("mine")
    with pytest.raises(UserError, match="without a recorded SHA-256"):
        fetch("it", tmp_path, registry(f"{upstream}/trace.txt", None))
    assert (tmp_path / "trace.txt").read_text() == "mine"
    assert names(tmp_path) == ["trace.txt"]


@pytest.mark.parametrize("content", ["{", "[]", '"x"'])
def test_a_spoilt_lock(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    with pytest.raises(UserError, match="delete it"):
        fetch("it", tmp_path, registry("http://127.0.0.1:1/trace.txt", None))


def test_listing_shows_url_digest_and_licence(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    out = capsys.readouterr().out
    for name, source in REGISTRY.items():
        assert f"{name}: " in out
        assert source.url in out
        assert source.licence in out
        assert source.sha256 is None or source.sha256 in out
    assert "unknown: the first download pins it" in out


def test_licence_and_digest_are_shown_on_download(upstream: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["it", "--out", str(tmp_path)], registry(f"{upstream}/trace.txt", None))
    out = capsys.readouterr().out
    assert "licence CC0" in out
    assert f"saved as {tmp_path / 'trace.txt'}, SHA-256 {DIGEST}" in out


def test_an_unknown_name_is_refused_before_anything_is_downloaded(upstream: str, tmp_path: Path) -> None:
    sources = registry(f"{upstream}/trace.txt", DIGEST)
    for arguments in (["it", "that"], []):
        with pytest.raises(UserError, match=r"unknown trace 'that'; choose from it|at least one trace: it"):
            main([*arguments, "--out", str(tmp_path)], sources)
    assert Upstream.asked == 0


def test_the_registry_is_sound() -> None:
    filenames = [source.filename for source in REGISTRY.values()]
    assert len(set(filenames)) == len(filenames)
    for source in REGISTRY.values():
        assert urlsplit(source.url).scheme == "https"
        assert source.sha256 is None or re.fullmatch("[0-9a-f]{64}", source.sha256)


def test_the_registered_azure_digest_is_that_of_the_real_trace() -> None:
    path = ROOT.parent / "shared" / "traces" / "AzureLLMInferenceTrace_conv.csv"
    if not path.exists():
        pytest.skip(f"the real trace is not at {path}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == REGISTRY["azure_2023_conv"].sha256


def test_the_script_ends_with_status_2_and_one_line() -> None:
    script = str(ROOT / "scripts" / "fetch_traces.py")
    done = subprocess.run([sys.executable, script, "no_such_trace"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown trace 'no_such_trace'")
    assert done.stderr.count("\n") == 1
