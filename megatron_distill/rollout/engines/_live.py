"""Servers, the fleet that gives them work and the supervision of both, in an event loop of a thread of its own.

First rank only, and not collective: what all ranks must do together, a push of weights, is asked for (`Outcome`), and
told of (`begin_push`, `end_push`, `break_push`). Everything that changes runs in the loop's thread; public methods may
be called from any other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from threading import Thread
from typing import Any, Protocol

from megatron_distill.errors import EngineError, ServerError, ServerLost, SyncError, WrongWeights
from megatron_distill.rollout.engines._supervision import Roster, State
from megatron_distill.rollout.fleet import Fleet
from megatron_distill.rollout.sglang import Address, Client

log = logging.getLogger(__name__)

UNNAMED = "default"
"""What a server calls its weights that nobody has given a version."""


class Keeper(Protocol):
    """Who ends servers and begins them again."""

    def alive(self, url: str) -> bool:
        """Whether its process has not ended, as far as can be told."""
        ...

    async def revive(self, url: str) -> None:
        """End what is left of a server and begin it again; returns when it answers.

        Raises:
            EngineError: it does not come back.
        """
        ...

    def close(self) -> None:
        """End what was begun here."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Care:
    """How servers are looked after."""

    probe_seconds: float
    """Between two looks at a server, and for each to be answered."""
    silent_seconds: float
    """How long a server may leave every look unanswered before it counts as hung."""
    most_restarts: int
    """Of all servers together."""


class Need(Enum):
    """Why work is not done yet."""

    TIME = "time"
    """Ask again."""
    WEIGHTS = "weights"
    """A server waits for the weights in force; others may be at work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Where a piece of work stands; picklable, so that every rank can be told."""

    results: list[Any] | None = None
    need: Need | None = None
    failure: EngineError | None = None


type Work = asyncio.Task[list[Any]]
"""Some that the fleet has to do."""


class LiveFleet:
    """Serves from `open` to `close`."""

    def __init__(self, clients: Sequence[Client], keeper: Keeper, care: Care, in_flight: int) -> None:
        self._clients: Mapping[str, Client] = {client.url: client for client in clients}
        self._keeper, self._care = keeper, care
        self._roster = Roster(self._clients, care.most_restarts)
        self._fleet = Fleet(clients, in_flight=in_flight, on_lost=self._lost_by_fleet)
        self._version = -1
        self._pushes = 0
        self._failure: EngineError | None = None
        self._mistake: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="sglang fleet", daemon=True)
        self._changed = asyncio.Event()

    # -- from other threads ------------------------------------------------------------------------------------------

    def open(self, check: Callable[[Client], Awaitable[None]]) -> None:
        """Begin; the servers answer already.

        Args:
            check: sees that a server is the right one, or raises.

        Raises:
            EngineError: one of them is not.
        """
        self._thread.start()
        self._check = check
        self._run(self._open())

    def close(self) -> None:
        """Hang up and end the servers that were begun here; safe to call twice, and when `open` has failed."""
        if self._thread.is_alive():
            self._run(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self._keeper.close()

    def begin(self, ask: Callable[[Fleet], Coroutine[Any, Any, list[Any]]]) -> Work:
        """Give the fleet work; `wait` says what becomes of it."""
        return self._run(self._begin(ask))

    def wait(self, work: Work, *, seconds: float, pushes: bool) -> Outcome:
        """The results, or after some time why there are none yet.

        Args:
            work: what `begin` gave.
            seconds: after which `Need.TIME` is told.
            pushes: whether the caller can push weights, and wants to be told that a server needs them.
        """
        return self._run(self._wait(work, seconds, pushes))

    def begin_push(self, version: int, *, everyone: bool, seconds: float) -> Outcome:
        """Where to push weights of this version, `Address`es in `results`; supervision sleeps until the push ended.

        Args:
            version: of the weights.
            everyone: push to all that react; otherwise to those alone that have no weights.
            seconds: how long to wait for a server where none reacts; then `Need.TIME`, and supervision does not sleep.
        """
        return self._run(self._begin_push(version, everyone, seconds))

    def end_push(self, addresses: Sequence[Address], version: int) -> None:
        """All of these hold the weights now."""
        self._run(self._end_push(addresses, version))

    def break_push(self, addresses: Sequence[Address], lost: Sequence[str], why: str) -> None:
        """The push failed: `lost` do not react, and what the others hold is not known."""
        self._run(self._break_push(addresses, lost, why))

    def name_own_weights(self, addresses: Sequence[Address], version: int) -> SyncError | None:
        """Give the weights that servers were started with a version; what is wrong, if anything is."""
        return self._run(self._name_own_weights(addresses, version))

    def abort(self) -> None:
        """Let work in flight end with what was written."""
        self._run(self._fleet.abort_all())

    @property
    def needs_weights(self) -> bool:
        """Whether a server waits for them."""
        return bool(self._roster.within(State.STALE))

    @property
    def figures(self) -> dict[str, float]:
        """What supervision had to do so far, and how many servers serve."""
        return {
            "restarts": self._roster.restarts,
            "redone": self._fleet.redone,
            "serving": len(self._roster.within(State.SERVING)),
        }

    def _run[Result](self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # -- in the loop's thread ----------------------------------------------------------------------------------------

    async def _open(self) -> None:
        await self._fleet.__aenter__()
        for url, client in self._clients.items():
            await self._check(client)
            self._roster.started(url, time.monotonic())
            self._fleet.withdraw(url, EngineError(f"{url}: has no weights of this run yet"))
        self._spawn(self._watch())

    async def _close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(ServerError):
            await self._fleet.__aexit__(None, None, None)

    async def _begin(self, ask: Callable[[Fleet], Coroutine[Any, Any, list[Any]]]) -> Work:
        return asyncio.create_task(ask(self._fleet))

    async def _wait(self, work: Work, seconds: float, pushes: bool) -> Outcome:
        end = time.monotonic() + seconds
        while True:
            if work.done():
                error = work.exception()
                return Outcome(failure=error) if isinstance(error, EngineError) else Outcome(results=work.result())
            self._reraise()
            if self._failure is not None:
                work.cancel()
                return Outcome(failure=self._failure)
            if pushes and self._roster.within(State.STALE):
                return Outcome(need=Need.WEIGHTS)
            if time.monotonic() >= end:
                return Outcome(need=Need.TIME)
            await self._change(end - time.monotonic(), work)

    async def _change(self, seconds: float, *others: asyncio.Future[Any]) -> None:
        """Return when anything changed, one of the others is done, or after so many seconds."""
        self._changed.clear()
        change = asyncio.create_task(self._changed.wait())
        await asyncio.wait({change, *others}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        change.cancel()

    # -- pushes ------------------------------------------------------------------------------------------------------

    async def _begin_push(self, version: int, everyone: bool, seconds: float) -> Outcome:
        states = (State.STALE, State.SERVING, State.SUSPECT) if everyone else (State.STALE,)
        self._reraise()
        # from here on nobody is restarted under the hands of those who push
        self._pushes += 1
        candidates = self._roster.within(*states)
        # one that hangs would hold up the push for as long as an update may take
        reacts = await asyncio.gather(*map(self._reacts, candidates))
        for url, answered in zip(candidates, reacts, strict=True):
            if not answered:
                self._lose(url, f"{url}: hung, or gone, when it was to get new weights")
        if any(reacts):
            self._fleet.expect(version)
            reacting = [url for url, answered in zip(candidates, reacts, strict=True) if answered]
            return Outcome(results=[self._clients[url].address for url in reacting])
        self._pushes -= 1
        if self._failure is None and not self._roster.within(State.STALE):
            await self._change(seconds)
        return Outcome(need=Need.TIME, failure=self._failure)

    async def _reacts(self, url: str) -> bool:
        """Whether it says so within `silent_seconds`, of a few times that it is asked."""
        end = time.monotonic() + self._care.silent_seconds
        while self._keeper.alive(url):
            if await self._clients[url].reacts(self._care.probe_seconds):
                return True
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(min(1.0, self._care.probe_seconds))
        return False

    async def _end_push(self, addresses: Sequence[Address], version: int) -> None:
        self._pushes -= 1
        for address in addresses:
            self._roster.pushed(address.url, time.monotonic())
        self._version = version
        self._fleet.announce(version)
        for address in addresses:
            self._fleet.admit(address.url)
        self._changed.set()

    async def _name_own_weights(self, addresses: Sequence[Address], version: int) -> SyncError | None:
        for address in addresses:
            client = self._clients[address.url]
            try:
                held = await client.version()
                if held not in (UNNAMED, str(self._version)):
                    return SyncError(
                        f"{address.url}: holds weights {held!r} that somebody gave it, not those that it was started "
                        "with: start it anew"
                    )
                await client.set_version(str(version))
            except ServerError as error:
                return SyncError(str(error), servers=(address.url,))
        return None

    async def _break_push(self, addresses: Sequence[Address], lost: Sequence[str], why: str) -> None:
        self._pushes -= 1
        for address in addresses:
            if address.url in lost:
                self._lose(address.url, why)
            else:
                self._outdate(address.url, why)

    # -- supervision -------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._care.probe_seconds)
            if not self._pushes:
                living = self._roster.within(State.STALE, State.SERVING, State.SUSPECT)
                await asyncio.gather(*map(self._look_at, living))

    async def _look_at(self, url: str) -> None:
        """See whether a server lives, reacts, and computes; never acts while weights are pushed."""
        error = await self._unhealthy(url) if self._keeper.alive(url) else None
        state = self._roster[url].state
        if self._pushes or state not in (State.STALE, State.SERVING, State.SUSPECT):
            return
        if not self._keeper.alive(url):
            self._lose(url, f"{url}: its process has ended")
        elif error is None:
            if state is State.SUSPECT:
                await self._welcome_back(url)
        elif state is State.SERVING:
            self._roster.doubt(url, str(error), time.monotonic())
        elif state is State.SUSPECT and time.monotonic() - self._roster[url].since > self._care.silent_seconds:
            self._lose(url, f"{url}: silent for {self._care.silent_seconds:g} s: {error}")

    async def _unhealthy(self, url: str) -> ServerError | None:
        """What is wrong with it: it is made to compute, unless it does so already."""
        try:
            await self._clients[url].call("GET", "/health_generate", seconds=self._care.probe_seconds)
        except ServerError as error:
            return error
        return None

    async def _welcome_back(self, url: str) -> None:
        """A suspect that answers serves again, if it still holds the weights in force."""
        try:
            told = await self._clients[url].call("GET", "/model_info", seconds=self._care.probe_seconds)
        except ServerError:
            return
        if self._pushes or self._roster[url].state is not State.SUSPECT:
            return
        version = told.get("weight_version") if isinstance(told, dict) else None
        if version != str(self._version):
            self._outdate(url, f"{url}: holds weights {version!r}, {self._version} are in force")
            return
        self._roster.trust(url, time.monotonic())
        self._fleet.admit(url)

    def _lost_by_fleet(self, url: str, error: EngineError) -> None:
        """A request was not answered, or by other weights; the fleet gives it no more work."""
        if self._roster[url].state is not State.SERVING:
            return
        if isinstance(error, WrongWeights):
            self._outdate(url, str(error))
            return
        self._roster.doubt(url, str(error), time.monotonic())
        self._spawn(self._look_at(url))

    def _outdate(self, url: str, why: str) -> None:
        self._roster.outdate(url, why, time.monotonic())
        self._fleet.withdraw(url, WrongWeights(why, server=url))
        self._changed.set()

    def _lose(self, url: str, why: str) -> None:
        self._roster.lose(url, why, time.monotonic())
        self._fleet.withdraw(url, ServerLost(why, server=url))
        self._spawn(self._restart(url))

    async def _restart(self, url: str) -> None:
        """Until it answers, or the run's restarts are used up."""
        while self._roster.restart(url, time.monotonic()):
            log.warning("%s; restart %d of %d", self._roster[url].why, self._roster.restarts, self._care.most_restarts)
            try:
                await self._keeper.revive(url)
                await self._check(self._clients[url])
            except EngineError as error:
                self._roster.lose(url, str(error), time.monotonic())
                continue
            self._roster.started(url, time.monotonic())
            self._changed.set()
            return
        self._failure = EngineError(
            f"{self._roster[url].why}; the run's servers were restarted {self._roster.restarts} times, "
            f"most_restarts={self._care.most_restarts}: see the server's log, then resume the run"
        )
        self._changed.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._mistake = error
            self._changed.set()

    def _reraise(self) -> None:
        """A mistake of ours in the background must not pass unseen."""
        if self._mistake is not None:
            raise self._mistake
