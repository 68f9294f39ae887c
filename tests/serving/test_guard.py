"""Clients that the server answers: hosts, origins, keys, queries, clients, TLS."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lambdascale.core import UserError
from lambdascale.live.serving.guard import client_of
from lambdascale.live.serving.options import KEY_VARIABLE, HttpOptions, bind, read_keys
from tests.serving.harness import Running

Start = Callable[..., Running]
BODY = {"model": "tiny", "prompt": "a", "max_tokens": 2}


class TestHosts:
    @pytest.mark.parametrize(
        ("host", "status"),
        [
            ("localhost", 200),
            ("LOCALHOST:8000", 200),
            ("127.0.0.1:8000", 200),
            ("[::1]:8000", 200),
            ("192.0.2.7", 200),
            ("evil.example", 421),
            ("localhost.evil.example", 421),
            ("evil.example:8000", 421),
            ("127.0.0.1.evil.example", 421),
            ("", 421),
            ("[::1", 421),
        ],
    )
    def test_a_foreign_name_is_refused(self, shared: Running, host: str, status: int) -> None:
        """A page of evil.example, made to point here, has its own name in Host: DNS rebinding. Addresses are nobody's names."""
        with shared.client() as client:
            assert client.get("/health", headers={"Host": host}).status_code == status

    def test_names_that_are_allowed(self, start: Start) -> None:
        running = start(allowed_hosts=("Models.example",))
        with running.client() as client:
            assert client.get("/health", headers={"Host": "models.EXAMPLE:80"}).status_code == 200
            assert client.get("/health", headers={"Host": "other.example"}).status_code == 421
        assert running.refusals(421, "host") == 1
        anything = start(allowed_hosts=("*",))
        with anything.client() as client:
            assert client.get("/health", headers={"Host": "other.example"}).status_code == 200

    def test_an_old_client_that_names_none(self, shared: Running) -> None:
        assert shared.say(b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


class TestOrigins:
    @pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "localhost"])
    def test_pages_of_other_sites_are_refused(self, shared: Running, origin: str) -> None:
        """A refused page does not only get no answer: its request reaches no node."""
        before = len(shared.cluster.order)
        with shared.client() as client:
            answer = client.post("/v1/completions", json=BODY, headers={"Origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
        assert len(shared.cluster.order) == before

    def test_own_pages(self, shared: Running) -> None:
        with shared.client() as client:
            assert client.get("/health", headers={"Origin": f"http://localhost:{shared.port}"}).status_code == 200

    def test_sites_that_are_allowed(self, start: Start) -> None:
        """A browser asks first, without a key."""
        running = start(cors_origins=("https://good.example",), api_keys=("k",))
        headers = {"Origin": "https://good.example", "Authorization": "Bearer k"}
        with running.client() as client:
            asking = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
            assert client.options("/v1/completions", headers=asking).status_code == 200
            answer = client.post("/v1/completions", json=BODY, headers=headers)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "https://good.example"
            evil = client.post("/v1/completions", json=BODY, headers=headers | {"Origin": "https://evil.example"})
            assert evil.status_code == 403


class TestKeys:
    @pytest.mark.parametrize(
        ("given", "status"),
        [
            ({}, 401),
            ({"Authorization": "Bearer one"}, 200),
            ({"Authorization": "bearer  two"}, 200),
            ({"Authorization": "Bearer on"}, 401),
            ({"Authorization": "Bearer one1"}, 401),
            ({"Authorization": "Bearer"}, 401),
            ({"Authorization": "Basic one"}, 401),
            ({"Authorization": b"Bearer \xff\xfe"}, 401),
        ],
    )
    def test_all_but_conditions_need_one(self, start: Start, given: dict[str, Any], status: int) -> None:
        running = start(api_keys=("one", "two"))
        with running.client() as client:
            for path in ("/v1/models", "/metrics", "/cluster", "/openapi.json"):
                answer = client.get(path, headers=given)
                assert answer.status_code == status
                assert ("www-authenticate" in answer.headers) == (status == 401)
            assert client.post("/v1/completions", json=BODY, headers=given).status_code == status
            assert [client.get(path, headers=given).status_code for path in ("/health", "/ready")] == [200, 200]
        assert len(running.cluster.order) == (status == 200)

    def test_without_keys_any_is_accepted(self, shared: Running) -> None:
        """The openai client always sends one."""
        with shared.client() as client:
            assert client.get("/v1/models", headers={"Authorization": "Bearer none"}).status_code == 200

    def test_where_they_come_from(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
        assert read_keys(None) == ()
        file = tmp_path / "keys"
        file.write_text("first\n\n  second \nfirst\n")
        assert read_keys(f"@{file}") == ("first", "second")
        monkeypatch.setenv(KEY_VARIABLE, f"@{file}")
        assert read_keys(None) == ("first", "second")
        assert read_keys("mine") == ("mine",)

    @pytest.mark.parametrize("content", ["", "\n \n", "two words", "s\xfcß", "tab\tbed", "\x00"])
    def test_unusable_ones_are_not_repeated(self, tmp_path: Path, content: str) -> None:
        file = tmp_path / "keys"
        file.write_text(content)
        for given in (f"@{file}", content):
            with pytest.raises(UserError) as caught:
                read_keys(given)
            assert not content.strip() or content.strip() not in str(caught.value)

    def test_a_file_that_is_missing(self) -> None:
        with pytest.raises(UserError, match="cannot read --api-key @/nowhere: FileNotFoundError"):
            read_keys("@/nowhere")

    def test_they_are_not_shown(self) -> None:
        assert "secret" not in repr(HttpOptions(api_keys=("secret",)))


@pytest.mark.parametrize(
    ("scope", "client"),
    [
        ({"client": ("192.0.2.1", 5)}, "address 192.0.2.1"),
        ({"client": ("2001:db8:1:2:3:4:5:6", 5)}, "network 2001:db8:1:2::/64"),
        ({"client": ("2001:db8:1:2:ffff::1", 5)}, "network 2001:db8:1:2::/64"),
        ({"client": ("::ffff:192.0.2.1", 5)}, "address 192.0.2.1"),
        ({"client": None}, "host unknown"),
    ],
)
def test_clients_without_keys(scope: dict[str, Any], client: str) -> None:
    assert client_of(scope) == client


def test_nobody_is_believed_to_be_somebody_else(start: Start) -> None:
    """X-Forwarded-For would make one client many."""
    running = start(window=1, queue_requests=2)
    running.cluster.held = True
    with running.client() as client:
        for number in range(2):
            connection = running.connect()
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 192.0.2.%d\r\nContent-Length: 32\r\n\r\n"
                b'{"model": "tiny", "prompt": "a"}' % number
            )
            connection.close()
        assert client.get("/health").status_code == 200
    assert set(running.front_end.admission._lines) <= {"address 127.0.0.1"}


@pytest.mark.parametrize("query", ["x=1", "x", "model=tiny&x=1", "=", "%ff"])
def test_parameters_in_the_address(shared: Running, query: str) -> None:
    with shared.client() as client:
        answer = client.get(f"/v1/models?{query}")
    assert answer.status_code == 400
    assert query.partition("=")[0].replace("%ff", "\ufffd") in answer.json()["error"]["message"]


def test_a_compressed_body(shared: Running) -> None:
    with shared.client() as client:
        answer = client.post("/v1/completions", content=b"x", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("tls")
    paths = str(directory / "cert.pem"), str(directory / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-out", paths[0], "-keyout", paths[1]], check=True, capture_output=True)
    return paths


class TestTls:
    def test_it_serves_https(self, start: Start, certificate: tuple[str, str]) -> None:
        running = start(tls_cert=certificate[0], tls_key=certificate[1], receive_timeout_s=0.5)
        context = ssl.create_default_context(cafile=certificate[0])
        context.check_hostname = False
        with running.client(verify=context) as client:
            assert client.post("/v1/completions", json=BODY | {"stream": True}).status_code == 200
        with running.connect() as connection, context.wrap_socket(connection) as wrapped:
            wrapped.sendall(b"GET / HT")
            assert wrapped.recv(100).startswith(b"HTTP/1.1 408")

    @pytest.mark.parametrize("swapped", [(0, 0), (1, 1), (1, 0)])
    def test_files_that_do_not_belong_together(self, certificate: tuple[str, str], swapped: tuple[int, int]) -> None:
        options = HttpOptions(tls_cert=certificate[swapped[0]], tls_key=certificate[swapped[1]])
        with pytest.raises(UserError, match="cannot use --tls-cert"):
            options.tls()

    def test_a_key_with_a_password(self, certificate: tuple[str, str], tmp_path: Path) -> None:
        """The password is not asked for: nobody may be at the terminal."""
        locked = str(tmp_path / "locked.pem")
        command = ["openssl", "rsa", "-aes128", "-passout", "pass:x", "-in", certificate[1], "-out", locked]
        subprocess.run(command, check=True, capture_output=True)
        with pytest.raises(UserError, match="the key is encrypted"):
            HttpOptions(tls_cert=certificate[0], tls_key=locked).tls()


class TestOptions:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"queue_requests": 0}, "--queue-requests"),
            ({"queue_tokens": 0}, "--queue-tokens"),
            ({"client_share": 0.0}, "--client-share"),
            ({"client_share": 1.1}, "--client-share"),
            ({"client_share": float("nan")}, "--client-share"),
            ({"max_prompts": 0}, "--max-prompts"),
            ({"request_timeout_s": 0.0}, "--request-timeout-s"),
            ({"receive_timeout_s": float("inf")}, "--receive-timeout-s"),
            ({"send_timeout_s": float("nan")}, "--send-timeout-s"),
            ({"connections": 0}, "--connections"),
            ({"tls_cert": "x"}, "--tls-cert and --tls-key"),
            ({"cors_origins": ("example.org",)}, "--cors-origin"),
            ({"allowed_hosts": ("",)}, "--allowed-host"),
        ],
    )
    def test_out_of_range(self, changes: dict[str, Any], says: str) -> None:
        with pytest.raises(UserError, match=says):
            HttpOptions(**changes)

    @pytest.mark.parametrize(
        ("host", "keys", "warned"),
        [
            ("127.0.0.1", (), False),
            ("127.0.0.2", (), False),
            ("::1", (), False),
            ("localhost", (), False),
            ("0.0.0.0", (), True),
            ("::", (), True),
            ("192.0.2.1", (), True),
            ("models.example", (), True),
            ("0.0.0.0", ("k",), False),
        ],
    )
    def test_open_to_strangers(self, host: str, keys: tuple[str, ...], warned: bool) -> None:
        assert HttpOptions(host=host, api_keys=keys).open_to_strangers == warned

    @pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000")])
    def test_urls(self, host: str, url: str) -> None:
        assert HttpOptions(host=host).url == url

    @pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("no.such.name.invalid", 0), ("127.0.0.1", 99999)])
    def test_addresses_that_are_not_ours(self, host: str, port: int) -> None:
        with pytest.raises(UserError, match="cannot listen on"):
            bind(HttpOptions(host=host, port=port))

    def test_more_connections_than_descriptors(self) -> None:
        with pytest.raises(UserError, match="--connections 1000000000 needs"):
            bind(HttpOptions(connections=10**9))
