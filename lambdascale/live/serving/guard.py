"""Checks before a request is read: the host it is meant for, the page it comes from, its key, its query.

They also identify the client, for the clients' shares.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from lambdascale.live.serving.openai_api import ApiError
from lambdascale.live.serving.options import HttpOptions
from lambdascale.live.serving.tally import Tally

WITHOUT_KEY = ("/health", "/ready")
_SITE_BITS = 64  # of an IPv6 address: a single customer has at least so many addresses


def guarded(app: ASGIApp, options: HttpOptions, tally: Tally) -> ASGIApp:
    """Return ``app`` behind all checks; scopes then have ``client_id``."""
    guard = Guard(app, options, tally)
    if not options.cors_origins:
        return guard
    # Outside the check of keys: a browser's preflight request has none.
    return CORSMiddleware(
        guard, allow_origins=options.cors_origins, allow_methods=["GET", "POST"], allow_headers=["Authorization", "Content-Type"]
    )


class Guard:
    """Refuses what is not meant for this server or has no key, as an error in OpenAI's form."""

    def __init__(self, app: ASGIApp, options: HttpOptions, tally: Tally) -> None:
        self._app = app
        self._tally = tally
        self._keys = [key.encode() for key in options.api_keys]
        self._origins = {origin.rstrip("/") for origin in options.cors_origins}
        own = {"localhost", options.host, socket.gethostname(), *options.allowed_hosts}
        self._hosts = {name.lower() for name in own}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_origin(headers)
            key = self._key_of(headers)
            if self._keys and key is None and scope["path"] not in WITHOUT_KEY:
                raise _no_key()
            self._check_query(scope)
        except ApiError as error:
            self._tally.refused(error.status, error.reason)
            await error.response()(scope, receive, send)
            return
        scope["client_id"] = client_of(scope) if key is None else f"key {key}"
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        """Refuse a name that is not ours: a foreign page may have made it point here (DNS rebinding). Addresses are no names."""
        if "host" not in headers or "*" in self._hosts:
            return
        host = _host_of(f"//{headers['host']}")
        if host is None or not (host in self._hosts or _is_address(host)):
            message = f"this server is not {headers['host']!r}: --allowed-host adds names"
            raise ApiError(421, message, reason="host")

    def _check_origin(self, headers: Headers) -> None:
        """Refuse a request that another site's page makes, unless the site is allowed: browsers send even what they hide."""
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return
        if origin.partition("://")[2] != headers.get("host"):
            raise ApiError(403, "pages of other sites may not use this server: --cors-origin allows them", reason="origin")

    def _key_of(self, headers: Headers) -> int | None:
        """Return the number of the request's key, None without a right one. All keys are compared, each in constant time."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        offered = given.strip().encode("latin-1")
        matches = [hmac.compare_digest(offered, key) for key in self._keys]
        return matches.index(True) if kind.lower() == "bearer" and any(matches) else None

    @staticmethod
    def _check_query(scope: Scope) -> None:
        """Refuse parameters in the address: no endpoint has any."""
        if scope["query_string"]:
            names = [name for name, _ in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)]
            name = names[0] if names else scope["query_string"].decode("latin-1")
            raise ApiError(400, f"unknown parameter {name!r} in the address", param=name, reason="bad_request")


def client_of(scope: Scope) -> str:
    """Return the client of a request without a key: its address, in IPv6 its network."""
    host = scope["client"][0] if scope.get("client") else "unknown"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"host {host}"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return f"address {address.ipv4_mapped}"
        return f"network {ipaddress.ip_network((int(address), _SITE_BITS), strict=False)}"
    return f"address {address}"


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _no_key() -> ApiError:
    error = ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", "authentication_error", reason="api_key")
    error.headers["WWW-Authenticate"] = "Bearer"
    return error
