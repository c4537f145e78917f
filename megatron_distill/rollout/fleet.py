"""Several SGLang servers as one: work goes to the least busy, and what a lost server owed is asked of another.

The fleet starts and heals nothing. It tells whoever supervises (`on_lost`) that a server was lost, gives it no more
work until it is admitted again, and keeps its requests meanwhile: each is answered once, or the whole call fails.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from megatron_distill.errors import EngineError, RequestTimedOut, ServerFailed, ServerLost, WrongWeights
from megatron_distill.rollout.base import Completion, Given, Request
from megatron_distill.rollout.sglang import Client
from megatron_distill.rollout.wire import Scores
from megatron_distill.types import Stop

ATTEMPTS = 5
"""How often one request is sent at most: one that kills every server that takes it must not do so for ever.

Those that were withdrawn from a lost server do not count: how often servers may come back is for whoever admits them.
"""
FIRST_PAUSE = 0.2
"""Seconds before asking again a server that lives but failed; each further pause is twice as long."""
ABORT_AGAIN = 0.5
"""Seconds until those that an abort missed are aborted again."""


@dataclass(slots=True, eq=False)
class _Server:
    client: Client
    serving: bool = True
    busy: set[asyncio.Task[Any]] = field(default_factory=set)
    """Requests in flight there."""
    why: EngineError | None = None
    """Why it was last withdrawn."""


class _Stopped(Exception):
    """`abort_all` was called before a request was sent."""


class Fleet:
    """Some servers that hold the same weights. Belongs to the event loop in which it is entered (`async with`).

    Args:
        clients: one per server; entered and closed with the fleet.
        in_flight: requests at a time on each server.
        on_lost: told of each server that was taken out, and why. Without it, a server that is lost stays out, and when
            none is left the call fails.
    """

    def __init__(
        self,
        clients: Iterable[Client],
        *,
        in_flight: int = 256,
        on_lost: Callable[[str, EngineError], None] | None = None,
    ) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight={in_flight}: must be at least 1")
        self._servers = {client.url: _Server(client) for client in clients}
        self._in_flight = in_flight
        self._on_lost = on_lost
        self._versions: list[int] = []
        self._settled = -1
        self._stops = 0
        """How often `abort_all` was called."""
        self.redone = 0
        """Requests that were sent once more because a server failed."""
        self._lost: EngineError | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._name, self._number = uuid.uuid4().hex[:8], itertools.count()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for server in self._servers.values():
            await self._stack.enter_async_context(server.client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    # -- servers -----------------------------------------------------------------------------------------------------

    @property
    def clients(self) -> list[Client]:
        """Of all servers, serving or not."""
        return [server.client for server in self._servers.values()]

    @property
    def serving(self) -> list[str]:
        """Addresses of the servers that get work."""
        return [url for url, server in self._servers.items() if server.serving]

    @property
    def lost(self) -> list[str]:
        """Addresses of those that do not."""
        return [url for url, server in self._servers.items() if not server.serving]

    def withdraw(self, url: str, why: EngineError) -> None:
        """Give a server no more work and ask others for what it owes; `on_lost` is told if it was serving."""
        server = self._servers[url]
        if not server.serving:
            return
        server.serving, server.why, self._lost = False, why, why
        for task in server.busy:
            task.cancel()
        if self._on_lost is not None:
            self._on_lost(url, why)
        self._wake(len(self._waiting))

    def admit(self, url: str) -> None:
        """Give a server work again: it is alive and holds the announced weights."""
        self._servers[url].serving = True
        self._wake(len(self._waiting))

    # -- versions ----------------------------------------------------------------------------------------------------

    def expect(self, version: int) -> None:
        """Servers are about to be given these weights: answers by them are welcome from now on."""
        if version not in self._versions:
            self._versions.append(version)

    def announce(self, version: int) -> None:
        """All serving servers hold these weights: what is asked from now on must be answered by them, or newer ones."""
        self.expect(version)
        self._settled = version

    # -- work --------------------------------------------------------------------------------------------------------

    async def generate_all(
        self, requests: Sequence[Request], on_done: Callable[[int, Completion], None] | None = None
    ) -> list[Completion]:
        """One completion per request, in order.

        Args:
            requests: prompts; all of them are sent as places become free.
            on_done: called with the index of each request, exactly once, as soon as it is answered.

        Raises:
            EngineError: the first failure that asking again cannot help; everything else in flight is aborted.
        """

        stops = self._stops

        async def one(index: int, request: Request) -> Completion:
            try:
                completion = await self._ask(lambda client, rid: self._generate(client, request, rid, stops), stops)
            except _Stopped:
                completion = Completion(tokens=(), logprobs=(), stop=Stop.ABORTED, version=self._settled)
            if on_done is not None:
                on_done(index, completion)
            return completion

        return await _all([one(index, request) for index, request in enumerate(requests)])

    async def score_all(
        self, given: Sequence[Given], top_k: int = 0, on_done: Callable[[int, Scores], None] | None = None
    ) -> list[Scores]:
        """Log-probs of each, in order; whose weights they are is in `Scores.version` and not compared.

        Args:
            given: tokens and from where on they are scored.
            top_k: likeliest ids at each place; 0 for none.
            on_done: called with each index, exactly once, as soon as it is answered.

        Raises:
            EngineError: as `generate_all`.
        """

        async def one(index: int, what: Given) -> Scores:
            found = await self._ask(lambda client, rid: client.score(what, rid, top_k), None)
            if on_done is not None:
                on_done(index, found)
            return found

        return await _all([one(index, what) for index, what in enumerate(given)])

    async def abort_all(self) -> None:
        """End every `generate_all` that runs: its callers get what was written, nothing of what was not yet sent."""
        self._stops += 1
        self._wake(len(self._waiting))
        await _all([self._abort(server) for server in self._servers.values()])

    async def _abort(self, server: _Server) -> None:
        """Until all that is in flight there has ended: a request that is on its way is not known to the server yet."""
        busy = set(server.busy)
        while server.serving and busy:
            try:
                await server.client.abort_all()
            except (ServerLost, RequestTimedOut) as error:
                self.withdraw(server.client.url, error)
            _, busy = await asyncio.wait(busy, timeout=ABORT_AGAIN)

    async def _generate(self, client: Client, request: Request, rid: str, stops: int) -> Completion:
        least = self._settled
        completion = await client.generate(request, rid)
        if completion.stop is Stop.ABORTED and stops == self._stops:
            raise ServerFailed(
                f"{client.url}: request {rid} was aborted, though not by this fleet; does somebody else use the "
                "server, or pause it in mode abort?",
                server=client.url,
                request=rid,
            )
        for version in {completion.version, *completion.versions}:
            if version not in self._versions or version < least:
                raise WrongWeights(
                    f"{client.url}: request {rid} was answered by weights of version {version}; when it was sent, "
                    f"{least} was in force, and this run announced {self._versions[-3:]}; the server missed an update: "
                    "it must be given the weights again before it serves",
                    server=client.url,
                    request=rid,
                )
        return completion

    async def _ask[Answer](
        self, send: Callable[[Client, str], Coroutine[Any, Any, Answer]], stops: int | None
    ) -> Answer:
        """One answer; only what can succeed is sent again, and nothing once `_stops` is no longer `stops`."""
        attempts = 0
        while True:
            server, pause, counts = await self._place(stops), 0.0, True
            task: asyncio.Task[Answer] = asyncio.create_task(send(server.client, self._rid()))
            server.busy.add(task)
            try:
                return await task
            except (ServerLost, WrongWeights) as error:
                self.withdraw(server.client.url, error)
                failure: EngineError = error
            except (ServerFailed, RequestTimedOut) as error:
                failure, pause = error, FIRST_PAUSE * 2**attempts
            except asyncio.CancelledError:
                if not self._took_back(server, task):
                    raise
                assert server.why is not None
                failure, counts = server.why, not isinstance(server.why, ServerLost)
            finally:
                server.busy.discard(task)
                self._wake(1)
            attempts += counts
            if attempts == ATTEMPTS:
                raise failure
            await asyncio.sleep(pause)
            self.redone += 1

    def _took_back(self, server: _Server, task: asyncio.Task[Any]) -> bool:
        """Whether `withdraw` cancelled the request, and not its caller."""
        current = asyncio.current_task()
        assert current is not None
        if current.cancelling():
            task.cancel()
            return False
        return True

    def _rid(self) -> str:
        return f"{self._name}-{next(self._number)}"

    async def _place(self, stops: int | None) -> _Server:
        """The least busy server, as soon as one has room."""
        while True:
            if stops is not None and stops != self._stops:
                raise _Stopped
            open_ones = [server for server in self._servers.values() if server.serving]
            if not open_ones and self._on_lost is None:
                raise self._lost or EngineError("the fleet has no servers; give at least one address")
            if open_ones:
                least = min(open_ones, key=lambda server: len(server.busy))
                if len(least.busy) < self._in_flight:
                    return least
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake(1)  # the place that was meant for this one
                raise

    def _wake(self, count: int) -> None:
        """Let some of those who wait for a place look again."""
        while self._waiting and count > 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1


async def _all[Answer](work: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """All results in order; at the first failure the rest is cancelled, and has ended when it is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
