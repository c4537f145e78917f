"""HTTP to one server: every failure as the error that says whether asking again can help."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from megatron_distill.errors import BadAnswer, RequestRefused, RequestTimedOut, ServerFailed, ServerLost, WrongWeights
from megatron_distill.rollout.wire import UnknownVersion

TOLD = 500
"""Characters of a server's own words that an error repeats."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    url: str
    """`http://host:port`."""
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={self.url!r}: must look like http://host:port")
        if parts.username is not None or parts.password is not None:
            # not shown: it may be a secret, and addresses stand in logs
            raise ValueError(
                f"url of {parts.hostname}: must name no user and no password; a key goes into api_key_file"
            )
        object.__setattr__(self, "url", self.url.rstrip("/"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long a client waits, in seconds."""

    request_seconds: float = 900.0
    """For one response or score, from sending to the last byte; time in which the server is paused counts."""
    control_seconds: float = 60.0
    """For everything else but updates of weights: information, pause, abort."""
    update_seconds: float = 900.0
    """For each call that moves weights."""
    connect_seconds: float = 10.0
    """Until a connection stands."""


class Connection:
    """Exchanges with one server; belongs to the event loop in which it is entered (`async with`)."""

    def __init__(self, address: Address, limits: Limits | None = None) -> None:
        self.address = address
        self.limits = limits or Limits()
        self._session: aiohttp.ClientSession | None = None

    @property
    def url(self) -> str:
        """The server's name in errors and logs."""
        return self.address.url

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self.address.api_key}"} if self.address.api_key else {}
        # a connection per request: one that was kept may be closed by the server at the moment of sending, which
        # cannot be told from a server that dies
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.limits.connect_seconds)
        self._session = aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up."""
        if self._session is not None:
            await self._session.close()

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, rid: str = "", seconds: float | None = None
    ) -> Any:
        """One exchange: the answer as JSON, as text if it is none.

        Args:
            method: of HTTP.
            path: on the server.
            body: sent as JSON.
            rid: the request that it is about, for errors.
            seconds: until the last byte; default `limits.control_seconds`.

        Raises:
            ServerLost: refused, reset, hung up, answer cut.
            RequestTimedOut: no whole answer in time.
            RequestRefused: 4xx.
            ServerFailed: 5xx.
            BadAnswer: any other status, or broken JSON.
        """
        assert self._session is not None, "enter the client first: async with Client(...)"
        seconds = self.limits.control_seconds if seconds is None else seconds
        named = {"server": self.url, "request": rid}
        where = self.where(path, rid)
        try:
            async with asyncio.timeout(seconds):
                async with self._session.request(
                    method, f"{self.url}{path}", json=body, allow_redirects=False
                ) as response:
                    status, content = response.status, await response.read()
        except aiohttp.ConnectionTimeoutError as error:
            raise ServerLost(f"{where}: no connection within {self.limits.connect_seconds:g} s", **named) from error
        except TimeoutError as error:
            raise RequestTimedOut(
                f"{where}: no answer within {seconds:g} s; the server hangs or has too much to do", **named
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerLost(
                f"{where}: {_happened(error)}; the server is gone, or died over it: see its log", **named
            ) from error
        return self._content(status, content, where, rid)

    def where(self, path: str, rid: str = "") -> str:
        """How an error begins."""
        return f"{self.url}{path}: request {rid}" if rid else f"{self.url}{path}"

    def _content(self, status: int, content: bytes, where: str, rid: str) -> Any:
        named = {"server": self.url, "request": rid}
        text = content.decode("utf-8", errors="replace")
        if status in (401, 403):
            raise RequestRefused(
                f"{where}: the server does not accept the API key (HTTP {status}); api_key_file must name the file "
                "whose key it was started with",
                **named,
                status=status,
            )
        if 400 <= status < 500:
            raise RequestRefused(f"{where}: refused with HTTP {status}: {_said(text)}", **named, status=status)
        if status >= 500:
            raise ServerFailed(f"{where}: failed with HTTP {status}: {_said(text)}; see the server's log", **named)
        if status != 200:
            raise BadAnswer(f"{where}: HTTP {status}, expected 200; is something else listening there?", **named)
        if not text.lstrip().startswith(("{", "[")):
            return text
        try:
            return json.loads(content)
        except ValueError as error:
            raise ServerLost(
                f"{where}: an answer that was cut, or is no JSON: {error}: {_said(text)}", **named
            ) from error

    def reading(self, path: str, rid: str = "") -> _Reading:
        """A context in which an answer is taken apart: what does not fit becomes `BadAnswer`."""
        return _Reading(self, path, rid)


@dataclass(frozen=True, slots=True)
class _Reading:
    connection: Connection
    path: str
    rid: str

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ValueError | KeyError | TypeError | IndexError | OverflowError):
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
            kind_of = WrongWeights if isinstance(error, UnknownVersion) else BadAnswer
            raise kind_of(
                f"{self.connection.where(self.path, self.rid)}: an answer that cannot be used: {said}",
                server=self.connection.url,
                request=self.rid,
            ) from error


def _happened(error: Exception) -> str:
    """What went wrong on the way, in words."""
    match error:
        case aiohttp.ClientPayloadError():
            return "the answer was cut short"
        case aiohttp.ServerDisconnectedError():
            return "hung up before it answered"
        case aiohttp.ClientConnectorError():
            return f"no connection ({error.os_error.strerror or error.os_error})"
        case aiohttp.ClientResponseError():
            return f"no HTTP ({' '.join(error.message.split())[:TOLD]})"
    return str(error) or type(error).__name__


def _said(text: str) -> str:
    """The message in a server's error, or all it said, cut."""
    try:
        told = json.loads(text)
    except ValueError:
        told = text
    for name in ("error", "message"):
        if isinstance(told, dict) and name in told:
            told = told[name]
    said = " ".join(str(told).split())
    return said if len(said) <= TOLD else f"{said[:TOLD]}..."
