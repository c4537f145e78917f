"""What a client makes of servers that fail: real ports that hang up, cut, stall or refuse."""

from __future__ import annotations

import asyncio
import itertools
import pickle
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from megatron_distill.errors import (
    BadAnswer,
    EngineError,
    RequestRefused,
    RequestTimedOut,
    ServerError,
    ServerFailed,
    ServerLost,
    SyncError,
    WrongWeights,
)
from megatron_distill.rollout.base import Completion, Given, Request, Sampling
from megatron_distill.rollout.fleet import Fleet
from megatron_distill.rollout.sglang import Address, Client, Limits
from tests.broken import Behaviour, closed_port, listening, resetting, saying, silent

ASKED = Request(tokens=(3, 4), sampling=Sampling(max_new_tokens=4), key=(1, 2))
SHORT = Limits(request_seconds=0.3, control_seconds=0.3, connect_seconds=0.3)


def http(status: str, body: bytes, *, length: int | None = None) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (
        status.encode(),
        len(body) if length is None else length,
        body,
    )


def failure(
    behave: Behaviour, work: Any = lambda client: client.call("POST", "/generate", {}, rid="r-7")
) -> EngineError:
    """The error that some work with a server of that behaviour ends in."""

    async def ask() -> EngineError:
        async with listening(behave) as url, Client(Address(url), limits=SHORT) as client:
            with pytest.raises(EngineError) as caught:
                await work(client)
            assert url in str(caught.value), "an error says which server"
            return caught.value

    return within(5, ask())


def within[T](seconds: float, work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(seconds):
            return await work

    return asyncio.run(limited())


@pytest.mark.parametrize(
    ("raw", "kind", "told"),
    [
        (http("200 OK", b'{"a": 1', length=500), ServerLost, "the answer was cut short"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n{",
            ServerLost,
            "the answer was cut short",
        ),
        (http("200 OK", b'{"output_ids": [1, 2'), ServerLost, "was cut, or is no JSON"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b'{"output_ids": [1, 2', ServerLost, "was cut, or is no JSON"),
        (b"", ServerLost, "hung up before it answered"),
        (b"220 smtp.example ESMTP\r\n\r\n", ServerLost, "no HTTP"),
        (
            http("400 Bad Request", b'{"error": {"message": "Input is too long"}}'),
            RequestRefused,
            "HTTP 400: Input is too",
        ),
        (http("400 Bad Request", b'{"success": false, "message": "no group"}'), RequestRefused, "HTTP 400: no group"),
        (http("404 Not Found", b"nothing here"), RequestRefused, "HTTP 404: nothing here"),
        (http("401 Unauthorized", b'{"error": "Unauthorized"}'), RequestRefused, "api_key_file"),
        (http("503 Service Unavailable", b'{"message": "queue is full"}'), ServerFailed, "HTTP 503: queue is full"),
        (http("500 Internal Server Error", b"x" * 5000), ServerFailed, "xxx\\.\\.\\."),
        (http("302 Found\r\nLocation: http://elsewhere.invalid/", b""), BadAnswer, "something else listening"),
    ],
)
def test_what_an_answer_means(raw: bytes, kind: type[ServerError], told: str) -> None:
    error = failure(saying(raw))
    assert type(error) is kind
    assert isinstance(error, ServerError)
    assert error.request == "r-7"
    assert "r-7" in str(error), "an error says which request"
    with pytest.raises(kind, match=told):
        raise error
    assert len(str(error)) < 1000


def test_an_address_holds_no_secret_since_it_is_shown() -> None:
    with pytest.raises(ValueError, match="must name no user and no password") as caught:
        Address("http://somebody:secret@10.0.0.7:30000")
    assert "secret" not in str(caught.value)


def test_a_port_nobody_listens_on() -> None:
    async def ask() -> None:
        async with Client(Address(f"http://127.0.0.1:{closed_port()}")) as client:
            assert not await client.reacts()
            with pytest.raises(ServerLost, match=r"no connection .*is gone"):
                await client.info()

    within(5, ask())


def test_a_connection_that_is_reset_is_a_lost_server() -> None:
    assert type(failure(resetting)) is ServerLost


def test_a_server_that_never_answers_costs_a_bounded_time() -> None:
    async def ask() -> None:
        async with listening(silent) as url, Client(Address(url), limits=SHORT) as client:
            assert not await client.reacts()
            with pytest.raises(RequestTimedOut, match=r"no answer within 0.3 s"):
                await client.info()
            with pytest.raises(RequestTimedOut):
                await client.pause()

    within(5, ask())


@pytest.mark.parametrize("session", [Client.begin_update, Client.end_update])
def test_a_server_without_the_routes_of_a_session_is_too_old_for_it(session: Any) -> None:
    async def ask(status: str) -> bool:
        async with listening(saying(http(status, b'{"detail": "no"}'))) as url, Client(Address(url)) as client:
            return await session(client)

    assert within(5, ask("200 OK")) is True
    assert within(5, ask("404 Not Found")) is False
    with pytest.raises(RequestRefused, match="HTTP 400"):
        within(5, ask("400 Bad Request"))


@pytest.mark.parametrize(
    "work",
    [lambda client: client.generate(ASKED, "r"), lambda client: client.score(Given(tokens=(3, 4), start=1), "r")],
)
def test_work_on_a_server_that_answers_nonsense_is_an_error(work: Any) -> None:
    error = failure(saying(http("200 OK", b'{"hello": "world"}')), work)
    assert type(error) is BadAnswer


def test_errors_cross_processes_whole() -> None:
    for error in (
        RequestRefused("why", server="http://a", request="r-1", status=404),
        ServerLost("why", server="http://a", request="r-1"),
        SyncError("why", servers=("http://a",)),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_a_key_is_never_shown() -> None:
    address = Address("http://127.0.0.1:1/", api_key="secret-123")
    assert address.url == "http://127.0.0.1:1"
    assert "secret-123" not in repr(address)
    seen: list[bytes] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(http("403 Forbidden", b""))

    async def ask() -> str:
        async with listening(note) as url, Client(Address(url, "secret-123")) as client:
            with pytest.raises(RequestRefused) as caught:
                await client.call("GET", "/model_info")
            return str(caught.value)

    assert "secret-123" not in within(5, ask())
    assert b"Authorization: Bearer secret-123" in seen[0]


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "ftp://host", "http://", ""])
def test_an_address_is_a_url(url: str) -> None:
    with pytest.raises(ValueError, match="http://host:port"):
        Address(url)


def test_a_fleet_without_anyone_to_heal_it_fails_when_its_last_server_is_lost() -> None:
    async def ask() -> tuple[list[str], str]:
        async with (
            listening(resetting) as one,
            listening(saying(b"")) as other,
            Fleet([Client(Address(one)), Client(Address(other))]) as fleet,
        ):
            with pytest.raises(ServerLost) as caught:
                await fleet.generate_all([ASKED] * 20)
            return fleet.lost, str(caught.value)

    lost, told = within(5, ask())
    assert len(lost) == 2
    assert any(url in told for url in lost)


def test_a_server_that_refuses_is_asked_once() -> None:
    asked = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await saying(http("400 Bad Request", b'{"message": "never"}'))(reader, writer)

    async def ask() -> None:
        async with listening(refuse) as url, Fleet([Client(Address(url))]) as fleet:
            with pytest.raises(RequestRefused, match="never"):
                await fleet.generate_all([ASKED])
            assert fleet.serving == [url], "a refusal says nothing against the server"
            assert fleet.redone == 0

    within(5, ask())
    assert asked == 1


def test_a_server_that_keeps_failing_is_asked_a_few_times_with_growing_pauses() -> None:
    asked: list[float] = []

    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(asyncio.get_running_loop().time())
        await saying(http("503 Service Unavailable", b'{"message": "the queue is full"}'))(reader, writer)

    async def ask() -> None:
        async with listening(fail) as url, Fleet([Client(Address(url))]) as fleet:
            with pytest.raises(ServerFailed, match="the queue is full"):
                await fleet.generate_all([ASKED])
            assert fleet.serving == [url]
            assert fleet.redone == 4

    within(10, ask())
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert len(pauses) == 4
    assert all(pause >= 0.19 * 2**number for number, pause in enumerate(pauses))


def test_a_request_is_withdrawn_from_hung_servers_as_often_as_they_come_back() -> None:
    """How often they may is for who supervises to say, and its bound is the larger one."""

    async def ask() -> None:
        async with withdrawing(ServerLost("silent"), times=8) as (fleet, task, answer):
            answer.set()
            with pytest.raises(RequestRefused, match="never"):
                await task
            assert fleet.redone == 8

    within(10, ask())


def test_a_request_is_given_up_when_its_servers_always_have_other_weights() -> None:
    async def ask() -> None:
        async with withdrawing(WrongWeights("an old version"), times=5) as (fleet, task, _):
            with pytest.raises(WrongWeights, match="an old version"):
                await task
            assert fleet.redone == 4

    within(10, ask())


@asynccontextmanager
async def withdrawing(
    why: EngineError, times: int
) -> AsyncIterator[tuple[Fleet, asyncio.Task[list[Completion]], asyncio.Event]]:
    """A request whose server was so often withdrawn, and admitted again, while it answered; it does when it is let."""
    asked, answer = asyncio.Queue[None](), asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.put_nowait(None)
        await answer.wait()
        await saying(http("400 Bad Request", b'{"message": "never"}'))(reader, writer)

    async with listening(hold) as url, Fleet([Client(Address(url))], on_lost=lambda url, why: None) as fleet:
        task = asyncio.create_task(fleet.generate_all([ASKED]))
        for _ in range(times):
            await asked.get()
            fleet.withdraw(url, why)
            fleet.admit(url)
        yield fleet, task, answer
