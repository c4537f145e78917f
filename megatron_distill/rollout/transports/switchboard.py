"""The same call to several servers at once, made by a program that goes on with something else meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from typing import Any

from megatron_distill.errors import RequestTimedOut, ServerError, ServerFailed, ServerLost, SyncError
from megatron_distill.rollout.sglang import Address, Client, Limits

GRACE_SECONDS = 5.0
"""After a first failure: how long the other servers may take to say how they are."""
REPAIR_SECONDS = 20.0
"""After an error: how long a server that seems to be there may take to be put right."""

type Call[T] = Callable[[Client], Coroutine[Any, Any, T]]


class Switchboard:
    """A client of each server, in an event loop of their own in a thread of its own, until `close`."""

    def __init__(self, addresses: Sequence[Address], limits: Limits) -> None:
        self.urls = tuple(address.url for address in addresses)
        self._clients = [Client(address, limits=limits) for address in addresses]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="weight-sync", daemon=True)
        self._thread.start()
        self._wait_for(self._open())

    def close(self) -> None:
        """Hang up; what is still being asked is given up."""
        self._wait_for(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def begin[T](self, call: Call[T]) -> Asked[T]:
        """Ask all, and do not wait."""
        return Asked(
            {client.url: asyncio.run_coroutine_threadsafe(call(client), self._loop) for client in self._clients}
        )

    def ask[T](self, call: Call[T], what: str) -> list[T]:
        """Ask all and wait: their answers in the order of the addresses.

        Raises:
            SyncError: one of them did not answer well; `what` says what it was asked for.
        """
        return self.begin(call).answers(what)

    def ask_if_there(self, call: Call[Any], *, but: Sequence[str] = ()) -> None:
        """Ask all but some, whatever becomes of it: for putting things right after an error."""

        async def bounded(client: Client) -> None:
            if client.url not in but:
                with suppress(ServerError, TimeoutError):
                    async with asyncio.timeout(REPAIR_SECONDS):
                        await call(client)

        wait(self.begin(bounded).futures.values())

    async def _open(self) -> None:
        for client in self._clients:
            await client.__aenter__()

    async def _shut(self) -> None:
        for client in self._clients:
            await client.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()


class Asked[T]:
    """Answers that are on their way."""

    def __init__(self, futures: dict[str, Future[T]]) -> None:
        self.futures = futures

    def answers(self, what: str) -> list[T]:
        """Wait for all of them.

        Raises:
            SyncError: one is no good.
        """
        if not self.went_well():
            raise self.failure(what)
        return [future.result() for future in self.futures.values()]

    def went_well(self, seconds: float | None = None) -> bool:
        """Wait until all have answered, or one has failed, or so long: whether all have answered well."""
        done, pending = wait(self.futures.values(), seconds, return_when=FIRST_EXCEPTION)
        return not pending and all(future.exception() is None for future in done)

    def failure(self, what: str) -> SyncError:
        """What went wrong, once every server has had time to say how it is. Servers that keep silent count as lost."""
        wait(self.futures.values(), GRACE_SECONDS)
        told: dict[str, BaseException] = {}
        silent = []
        for url, future in self.futures.items():
            if not future.done():
                future.cancel()
                silent.append(url)
            elif (error := future.exception()) is not None:
                if not isinstance(error, ServerError):
                    raise error  # a mistake of ours, not a fault of theirs
                told[url] = error
        lost = [url for url, error in told.items() if isinstance(error, ServerLost | ServerFailed | RequestTimedOut)]
        # what the lost ones say is the cause; what others say of the group that broke is its consequence
        reasons = [str(told[url]) for url in lost] + [f"{url}: no answer" for url in silent]
        reasons = reasons or [str(error) for error in told.values()]
        return SyncError(f"{what}: {'; '.join(reasons)}", servers=(*lost, *silent))
