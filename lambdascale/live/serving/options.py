"""Options of the HTTP side of a server: address, admitted clients, and bounds."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import ssl
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from lambdascale.core import UserError
from lambdascale.core.checks import check_types, require

HEAD_BYTES = 16 << 10  # of a request's first line and headers together
KEY_VARIABLE = "LAMBDASCALE_API_KEY"
_OTHER_FILES = 512  # descriptors besides those of connections: nodes, memory, libraries


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Bounds of the HTTP server; UserError for values out of range.

    ``queue_requests``, ``queue_tokens``: prompts that wait at a time, and their tokens with those of their answers (None: a
    quarter of what so many prompts can have). ``client_share``: the part of both that one client may take.
    ``request_timeout_s``: longest wait for the first token, and for each next one. ``receive_timeout_s``: until a request has
    come whole. ``send_timeout_s``: while a client reads nothing. ``connections``: open at a time.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    queue_requests: int = 1024
    queue_tokens: int | None = None
    client_share: float = 0.5
    max_prompts: int = 128
    request_timeout_s: float = 600.0
    receive_timeout_s: float = 30.0
    send_timeout_s: float = 60.0
    connections: int = 2048
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    tls_cert: str | None = None
    tls_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate."""
        times = ("request_timeout_s", "receive_timeout_s", "send_timeout_s")
        check_types(self, any_size=("client_share", *times))  # so that messages name the options
        for name in ("queue_requests", "max_prompts", "connections"):
            require(getattr(self, name) >= 1, f"--{_option(name)} must be at least 1, not {getattr(self, name)}")
        require(
            self.queue_tokens is None or self.queue_tokens >= 1, f"--queue-tokens must be at least 1, not {self.queue_tokens}"
        )
        require(0 < self.client_share <= 1, f"--client-share must be above 0 and at most 1, not {self.client_share}")
        for name in times:
            value = getattr(self, name)
            require(0 < value < 1e6, f"--{_option(name)} must be above 0 and below 1000000, not {value}")
        require((self.tls_cert is None) == (self.tls_key is None), "--tls-cert and --tls-key must be given together")
        require("" not in self.allowed_hosts, "--allowed-host must not be empty")
        for origin in self.cors_origins:
            usable = origin == "*" or origin.partition("://")[2].strip("/") != ""
            require(usable, f"--cors-origin must be like https://HOST, not {origin!r}")

    @property
    def open_to_strangers(self) -> bool:
        """True if other machines can connect and need no key."""
        return not self.api_keys and not _is_loopback(self.host)

    @property
    def url(self) -> str:
        """Return the server's address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self.tls_cert is None else 'https'}://{host}:{self.port}"

    def waiting_tokens(self, slot_tokens: int) -> int:
        """Bound on the tokens of waiting requests, where a sequence has ``slot_tokens`` at most."""
        return max(1, self.queue_requests * slot_tokens // 4) if self.queue_tokens is None else self.queue_tokens

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS context, None without a certificate. UserError if the files are not a certificate and its key."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key, password=_no_password)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise UserError(f"cannot use --tls-cert {self.tls_cert} with --tls-key {self.tls_key}: {error}") from error
        return context


def read_keys(given: str | None) -> tuple[str, ...]:
    """Return the API keys of ``--api-key``: a key, or @FILE with one a line; without it, of the environment.

    UserError, which never repeats a key, for a file that cannot be read and for keys that no header can carry.
    """
    where = "--api-key" if given is not None else KEY_VARIABLE
    source = given if given is not None else os.environ.get(KEY_VARIABLE)
    if source is None:
        return ()
    lines = [source]
    if source.startswith("@"):
        where = f"--api-key {source}"
        try:
            lines = Path(source[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {where}: {error.__class__.__name__}") from error
    keys = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not keys:
        raise UserError(f"{where} has no key")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UserError(f"{where}: a key consists of printable ASCII characters without spaces")
    return keys


def bind(options: HttpOptions) -> socket.socket:
    """Return the socket to listen on. UserError if the address is not available, or too few connections can be open."""
    _allow_files(options.connections + _OTHER_FILES)
    with ExitStack() as undo:
        try:
            family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
            bound = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((options.host, options.port))
        except (OSError, OverflowError, UnicodeError) as error:
            raise UserError(f"cannot listen on {options.host}:{options.port}: {error}") from error
        undo.pop_all()
    return bound


def _allow_files(wanted: int) -> None:
    """Raise this process's limit on open descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise UserError(
            f"--connections {wanted - _OTHER_FILES} needs {wanted} open descriptors, and this process may have {hard}: "
            f"--connections {max(1, hard - _OTHER_FILES)}, or raise ulimit -n"
        )
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _option(name: str) -> str:
    return name.replace("_", "-")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _no_password() -> str:
    """Refuse to ask for a password on the terminal: nobody sits at a server's."""
    raise ValueError("the key is encrypted")
