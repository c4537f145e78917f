"""What a teacher asks of the servers that run its model: whether they are the right ones, and scores.

Nothing here is collective, and no process is started or ended: see `remote`. Each call has an event loop of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_distill.errors import EngineError, ServerLost
from megatron_distill.models.spec import ModelLimits, read_config
from megatron_distill.rollout.base import Given
from megatron_distill.rollout.fleet import Fleet
from megatron_distill.rollout.sglang import Address, Client, Limits, Scores, ServerInfo

CANARY_TOKENS = 24
CANARY_TOLERANCE = 0.05
"""Nats per token, on average: far above what batching and caches do in bf16, far below another model's difference."""
ALIKE = "all servers of a teacher must hold one model, and nobody may give them other weights"
LOOK_SECONDS = 5.0
"""Between two looks at whether servers still react."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the servers should run, and how they are asked."""

    model: Path
    """Hugging Face folder."""
    served_as: str
    """What the servers call it."""
    vocabulary: int
    """Ids that all models of the run know."""
    in_flight: int
    request_seconds: float
    silent_seconds: float
    """How long a server may take to say that it is there, before it counts as hung."""

    def client(self, address: Address) -> Client:
        """One that speaks of the run's ids only."""
        limits = Limits(request_seconds=self.request_seconds)
        return Client(address, limits=limits, valid_vocab=self.vocabulary)


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduced:
    """What servers had to say of themselves, all of them alike."""

    longest: int
    """Most tokens that they read at once."""
    canary: np.ndarray
    """Log-probs of a fixed text."""
    version: str
    """What they call their weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How asking went; it is picklable, so that every rank can be told."""

    complete: bool
    """Whether everything was answered."""
    lost: tuple[str, ...] = ()
    """Servers that are dead or hang."""
    failure: EngineError | None = None
    """What asking again cannot help."""


def introduce(served: Served, addresses: Sequence[Address], known: Introduced | None = None) -> Introduced:
    """See that every server runs the model that the config names, and that all of them run the same weights.

    Args:
        served: what they should run.
        addresses: of the servers.
        known: what servers said earlier in this run: these must say the same.

    Raises:
        EngineError: one serves another model, or does not answer.
    """
    return asyncio.run(_introduce(served, addresses, known))


async def _introduce(served: Served, addresses: Sequence[Address], known: Introduced | None) -> Introduced:
    longest = ModelLimits.from_folder(served.model).max_positions
    for address in addresses:
        async with served.client(address) as client:
            info = await client.info()
            if wrong := _difference(served, info):
                raise EngineError(f"{address.url}: {wrong}")
            longest = min(longest, info.longest_prompt)
            for number in range(2):
                said = await client.score(_canary(served), rid=f"canary-{number}")
                known = known or Introduced(longest=longest, canary=said.logprobs, version=said.version)
                if wrong := _stranger(known, said):
                    raise EngineError(f"{address.url}: {wrong}")
    assert known is not None, "a teacher has servers"
    return replace(known, longest=min(longest, known.longest))


def _difference(served: Served, info: ServerInfo) -> str | None:
    """How a server's model differs from the one that is named."""
    if served.served_as not in (info.model_path, info.served_name, str(Path(info.model_path).resolve())):
        return (
            f"serves {info.model_path}, the teacher is {served.served_as}: name the right server, or, if that is the "
            f"same model under another path, set the teacher's served_as={info.model_path}"
        )
    named, told = read_config(served.model).get("architectures"), info.settings.get("architectures")
    if named and told and list(named) != list(told):
        return f"serves a {told}, {served.model} is a {named}: the folders differ, copy the served one"
    rows = ModelLimits.from_folder(served.model).vocab_size
    if info.vocab_size != rows:
        return (
            f"its model has {info.vocab_size} ids, {served.model} has {rows}: the folders differ, copy the served one"
        )
    return None


def _canary(served: Served) -> Given:
    """The same tokens at every time."""
    return Given(tokens=tuple((7 * place + 11) % served.vocabulary for place in range(CANARY_TOKENS)), start=1)


def _stranger(known: Introduced, said: Scores) -> str | None:
    """In what a server that is introduced differs from those before it, or from itself a moment ago."""
    error = float(np.abs(known.canary - said.logprobs).mean())
    if said.version == known.version and error <= CANARY_TOLERANCE:
        return None
    return (
        f"its weights are version {said.version!r} and give a fixed text log-probs {error:.3g} nats off those "
        f"of version {known.version!r} before: {ALIKE}"
    )


def ask(
    served: Served,
    addresses: Sequence[Address],
    given: Sequence[Given],
    top_k: int,
    on_done: Callable[[int, Scores], None],
) -> Outcome:
    """Scores of `given`, as many as the servers give before the last of them dies.

    Args:
        served: what they run.
        addresses: of the servers; work is spread over them, and a lost one's is done by the others.
        given: tokens and from where on they are scored.
        top_k: likeliest ids at each place; 0 for none.
        on_done: called with each index and its scores, once; an `EngineError` that it raises is the outcome's failure.
    """
    return asyncio.run(_ask(served, addresses, given, top_k, on_done))


async def _ask(
    served: Served,
    addresses: Sequence[Address],
    given: Sequence[Given],
    top_k: int,
    on_done: Callable[[int, Scores], None],
) -> Outcome:
    complete, failure = False, None
    async with Fleet([served.client(address) for address in addresses], in_flight=served.in_flight) as fleet:
        watch = asyncio.create_task(_watch(fleet, served.silent_seconds))
        try:
            await fleet.score_all(given, top_k, on_done)
            complete = True
        except ServerLost:
            pass  # it is among `fleet.lost`
        except EngineError as error:
            failure = error
        finally:
            watch.cancel()
        return Outcome(complete=complete, lost=tuple(fleet.lost), failure=failure)


async def _watch(fleet: Fleet, seconds: float) -> None:
    """Take out servers that no longer react, so that requests there do not wait for their own time to pass."""
    while True:
        await asyncio.sleep(min(LOOK_SECONDS, seconds))
        for client in fleet.clients:
            if client.url in fleet.serving and not await client.reacts(seconds):
                why = f"{client.url}: did not say within {seconds:g} s that it is there"
                fleet.withdraw(client.url, ServerLost(why, server=client.url))


def alive(served: Served, addresses: Sequence[Address]) -> list[str]:
    """Which of the servers react."""

    async def look() -> list[str]:
        found = []
        for address in addresses:
            async with served.client(address) as client:
                if await client.reacts(served.silent_seconds):
                    found.append(address.url)
        return found

    return asyncio.run(look())
