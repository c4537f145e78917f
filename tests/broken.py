"""Real sockets that break: ports that hang up, and relays that spoil what passes through them. Nothing here is a mock.

A relay stands between a client and a real server. It passes on everything until it is told what to break.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

type Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def closed_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@asynccontextmanager
async def listening(behave: Behaviour) -> AsyncIterator[str]:
    """The URL of a port on which each connection is treated by `behave`, then closed."""
    open_ones: set[asyncio.Task[None]] = set()

    async def treat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_ones.add(task)
        try:
            await behave(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            open_ones.discard(task)
            writer.close()

    server = await asyncio.start_server(treat, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in open_ones:
            task.cancel()
        await asyncio.gather(*open_ones, return_exceptions=True)


def saying(raw: bytes) -> Behaviour:
    """Read a whole request, write some bytes, hang up."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await whole_request(reader)
        writer.write(raw)
        await writer.drain()

    return behave


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read for ever and never answer."""
    while await reader.read(65536):
        pass


async def resetting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read a whole request, then reset the connection, as a killed process does."""
    await whole_request(reader)
    reset(writer)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side gets RST instead of an orderly end."""
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()


async def whole_request(reader: asyncio.StreamReader) -> bytes:
    """One HTTP request with its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
    )
    return head + await reader.readexactly(length)


class Relay:
    """Passes on what a client and a real server say to each other (`async with`), until told to break.

    What it is told applies to every connection, also those that stand already.
    """

    def __init__(self, url: str) -> None:
        self.host, _, port = url.removeprefix("http://").partition(":")
        self.port = int(port)
        self.url = ""
        self.cut_after: int | None = None
        """Bytes of each answer to a `/generate` that pass before the relay hangs up."""
        self.mute = False
        """Whether answers are swallowed: the server works, and nothing comes back."""
        self.dead = False
        """Whether every connection is reset."""
        self.requests = 0
        """How many times `/generate` was asked through it."""
        self._open: set[asyncio.StreamWriter] = set()
        self._stack = listening(self._pass_on)

    async def __aenter__(self) -> Relay:
        self.url = await self._stack.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.__aexit__(None, None, None)

    def die(self) -> None:
        """Reset all connections, now and from now on."""
        self.dead = True
        for writer in self._open:
            reset(writer)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.dead:
            reset(writer)
            return
        self._open.add(writer)
        there_reader, there_writer = await asyncio.open_connection(self.host, self.port)
        try:
            request = await whole_request(reader)
            generates = request.startswith(b"POST /generate")
            self.requests += generates
            there_writer.write(request)
            await there_writer.drain()
            await self._answer(there_reader, writer, generates)
        finally:
            self._open.discard(writer)
            there_writer.close()
            with suppress(ConnectionError):
                await there_writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, generates: bool) -> None:
        passed = 0
        while piece := await reader.read(65536):
            while self.mute:
                await asyncio.sleep(0.01)
            room = len(piece) if self.cut_after is None or not generates else max(self.cut_after - passed, 0)
            writer.write(piece[:room])
            await writer.drain()
            passed += room
            if room < len(piece):
                return
