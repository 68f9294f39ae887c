"""The rdma transport on real verbs: virtual machines with Soft-RoCE devices run the guest_* suites."""

from __future__ import annotations

import json
import shlex
import socket
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lambdascale.core import UserError
from lambdascale.testing.softroce import Outcome, Wire, ensure_packages, run, start

pytestmark = pytest.mark.rdma
HERE = Path(__file__).parent
SUITES = ("guest_transport", "guest_multicast", "guest_live")
# A whole run takes two minutes on two free cores; the limit fails runs that hang, not slow ones.
PATIENCE_S = 1200.0
PYTEST = ("pytest", "-c", "tests/rdma/guest.ini", "--rootdir", ".", "--noconftest", "-v")
PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    """Install the packages if possible; otherwise skip, naming what is missing."""
    try:
        ensure_packages()
    except UserError as error:
        pytest.skip(str(error))


@dataclass
class Guest:
    """A run of all suites in one guest, with its outcome and results folder."""

    outcome: Outcome
    results: Path

    def cases(self, suite: str) -> list[ET.Element]:
        path = self.results / "junit.xml"
        assert path.exists(), self.outcome.output[-5000:]
        return [case for case in ET.parse(path).iter("testcase") if f".{suite}" in f".{case.get('classname')}"]


@pytest.fixture(scope="module")
def guest(packages: None, tmp_path_factory: pytest.TempPathFactory) -> Guest:
    results = tmp_path_factory.mktemp("softroce")
    suites = [f"tests/rdma/{suite}.py" for suite in SUITES]
    tests = shlex.join([*PYTEST, "--junitxml=/run/results/junit.xml", *suites])
    measure = "python tests/rdma/bandwidth.py --mib 8 --repeat 2 --multicasts 1 >/run/results/bandwidth.json"
    outcome = run(["sh", "-c", f"{tests}; {measure}"], timeout_s=PATIENCE_S, results=results, environment=PLUGINS)
    return Guest(outcome, results)


@pytest.mark.parametrize("suite", SUITES)
def test_in_the_guest(guest: Guest, suite: str) -> None:
    cases = guest.cases(suite)
    assert cases, guest.outcome.output[-5000:]
    assert not [case.get("name") for case in cases if len(case)], guest.outcome.output[-20000:]


def test_bandwidth_is_measured(guest: Guest) -> None:
    """The bandwidth depends on the machine: see results/LOG.md for figures, and bandwidth.py for the command."""
    report = json.loads((guest.results / "bandwidth.json").read_text())
    low, high = report["transport_of_ib_write_bw_quartiles"]
    assert 0 < low <= report["transport_of_ib_write_bw"] <= high
    assert report["transport_bytes_per_s"] > 0
    assert report["multicast_per_node_of_point_to_point"] > 0
    assert report["paced_per_node_of_link"] > 0


def test_the_commands_status_comes_back() -> None:
    outcome = run(["sh", "-c", "ibv_devices; exit 7"], timeout_s=PATIENCE_S)
    assert outcome.status == 7, outcome.output
    assert "rxe0" in outcome.output
    assert "rxe1" in outcome.output


def test_a_command_that_does_not_end() -> None:
    outcome = run(["sleep", "1000"], timeout_s=1.0)
    assert outcome.status == 124


@pytest.fixture
def cable() -> Iterator[tuple[Wire, Wire]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return Wire(port=port, listens=True, host=1), Wire(port=port, listens=False, host=2)


def test_two_guests(cable: tuple[Wire, Wire]) -> None:
    """The conformance suite passes with a cable between the nodes."""
    one, two = cable
    here = {"GUEST_HERE": one.address, "GUEST_THERE": two.address, **PLUGINS}
    with start([*PYTEST, "tests/rdma/guest_pair.py"], timeout_s=PATIENCE_S, wire=one, environment=here, memory_mib=2048) as first:
        _wait_for_listener(one.port)
        serve = [sys.executable, "-m", "tests.rdma.remote", two.address]
        with start(serve, timeout_s=PATIENCE_S, wire=two, memory_mib=2048):
            outcome = first.wait()
    assert outcome.status == 0, outcome.output[-20000:]


def _wait_for_listener(port: int) -> None:
    """Wait until QEMU listens, without connecting, which would take its only connection."""
    wanted = f":{port:04X} 00000000:0000 0A"
    deadline = time.monotonic() + 30
    while wanted not in Path("/proc/net/tcp").read_text():
        assert time.monotonic() < deadline, "QEMU does not listen"
        time.sleep(0.05)
