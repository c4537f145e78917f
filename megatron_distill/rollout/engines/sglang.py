"""SGLang servers as the engine of a run: one for all ranks, started by the run or found running.

The first rank talks to the servers (`_live`); all ranks push weights to them together (`sync`). What the first rank
meets, results or trouble, it tells the others, so that every rank returns the same or raises the same.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar
from urllib.parse import urlsplit

from megatron_distill.data.templates import stop_ids
from megatron_distill.errors import EngineStopped, SyncError
from megatron_distill.models.student import Student
from megatron_distill.rollout.base import Completion, Given, HoldsWeights, Request, WholeWeights
from megatron_distill.rollout.engines._identity import check_server
from megatron_distill.rollout.engines._keepers import Elsewhere, Own
from megatron_distill.rollout.engines._live import Care, LiveFleet, Need
from megatron_distill.rollout.engines.base import EnginePart, Serving
from megatron_distill.rollout.fleet import Fleet
from megatron_distill.rollout.sample import on_first_rank
from megatron_distill.rollout.server_settings import KEPT, ServerSettings, is_loopback
from megatron_distill.rollout.sglang import Address, Client, Limits
from megatron_distill.rollout.sync import SyncSettings, WeightSync

REPORT_SECONDS = 30.0
"""How long ranks wait at most before the first one says that it is still busy: collectives must not time out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLang(EnginePart):
    """SGLang servers, which take the student's weights after every step; `make sglang` sets up what runs them."""

    everywhere: ClassVar[bool] = False

    servers: ServerSettings = field(default_factory=ServerSettings)
    """Servers that the run starts, and ends with itself."""
    urls: tuple[str, ...] = ()
    """Servers that run already, as `http://host:port`, in place of some of its own: those that
    `python -m launch.servers` has started."""
    in_flight: int = 256
    """Requests at a time on each server."""
    request_seconds: float = 900.0
    """Longest time for one response, pauses for new weights included; then it is aborted and asked for again."""
    probe_seconds: float = 5.0
    """Between two looks at each server, and for each of them to be answered."""
    silent_seconds: float = 60.0
    """How long a server may leave every look unanswered before it counts as hung, and is killed and restarted."""
    most_restarts: int = 10
    """Restarts of all servers together; the next one lost ends the run, with a checkpoint."""
    sync: SyncSettings = field(default_factory=SyncSettings)
    """How weights get there."""

    def __post_init__(self) -> None:
        for name, least in (("in_flight", 1), ("most_restarts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        urls = []
        for url in self.urls:
            try:
                urls.append(Address(url).url)
            except ValueError:
                raise ValueError(f"urls: {url!r}: must look like http://host:port") from None
        if twice := {url for url in urls if urls.count(url) > 1}:
            raise ValueError(f"urls: {min(twice)} is named twice")
        away = [url for url in self.urls if not is_loopback(urlsplit(url).hostname or "")]
        if away and self.servers.api_key_file is None:
            raise ValueError(
                f"urls: {away[0]} is reached over a network: start it with a key and name the file with the key in "
                "servers.api_key_file"
            )
        if away and self.sync.transport == "tensor":
            raise ValueError(
                f"sync.transport=tensor shares this machine's memory, {away[0]} is elsewhere: set broadcast or disk"
            )
        if self.probe_seconds < 2:
            raise ValueError(f"probe_seconds={self.probe_seconds}: must be at least 2, a server's own look takes 1")
        if self.silent_seconds < self.probe_seconds:
            raise ValueError(
                f"silent_seconds={self.silent_seconds}: must be at least probe_seconds={self.probe_seconds}"
            )

    def room(self, positions: int) -> int:
        """Those of a server's context, less what it keeps to itself."""
        return (self.servers.context_length or positions) - KEPT

    def connect(self, serving: Serving) -> SGLangEngine:
        """With servers that answer, and hold no weights of this run yet.

        Raises:
            EngineError: on every rank; a server does not start, or serves another model.
        """
        return SGLangEngine(self, serving)

    def live(self, serving: Serving) -> LiveFleet:
        """The servers, answering; first rank only."""
        keeper = (
            Elsewhere(self.urls, self.servers)
            if self.urls
            else Own(self.servers, serving.folder, serving.device, serving.run_folder)
        )
        care = Care(
            probe_seconds=self.probe_seconds, silent_seconds=self.silent_seconds, most_restarts=self.most_restarts
        )
        client = partial(
            Client,
            limits=Limits(request_seconds=self.request_seconds),
            valid_vocab=serving.valid_vocab,
            stop_ids=stop_ids(serving.tokenizer, serving.folder),
        )
        live: LiveFleet | None = None
        try:
            live = LiveFleet([client(address) for address in keeper.start()], keeper, care, self.in_flight)
            live.open(partial(check_server, folder=serving.folder, valid_vocab=serving.valid_vocab))
        except BaseException:
            (live or keeper).close()
            raise
        return live


class SGLangEngine:
    """The live engine; every method is collective."""

    everywhere = False
    updates_in_flight = True

    def __init__(self, part: SGLang, serving: Serving) -> None:
        self.version = -1
        self.weights_come_from_elsewhere = False
        """Whether another thread gives weights to servers that wait for them, and `generate` must not."""
        self._ranks = serving.ranks
        # pushes may come from another thread than answers, so the two must not share a process group
        self._pushing = serving.mesh or serving.ranks
        self._live: LiveFleet | None = None
        self._student: HoldsWeights | None = None

        def begin() -> None:
            self._live = part.live(serving)

        on_first_rank(serving.ranks, begin)
        self._folder = serving.folder
        self._leaves = bool(part.urls)
        sync = part.sync
        if part.urls and sync.transport == "auto":
            # an address of this machine may lead into a container, which shares no memory
            sync = replace(sync, transport="broadcast")
        self._sync = None if serving.mesh is None else WeightSync(sync, serving.mesh, run_folder=serving.run_folder)

    @property
    def needs_weights(self) -> bool:
        """Whether a server waits for the weights in force; only the first rank knows."""
        return self._live is not None and self._live.needs_weights

    @property
    def figures(self) -> dict[str, float]:
        """Restarts, requests sent again and servers at work so far; only the first rank knows."""
        return {} if self._live is None else self._live.figures

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order.

        Servers that die or hang meanwhile are restarted, given the weights in force, and their requests asked again.

        Raises:
            EngineStopped: on every rank; the servers cannot be made to answer.
        """
        return self._together(lambda fleet: fleet.generate_all(requests))

    def score(self, given: Sequence[Given], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """Log-probs of `tokens[start:]` of each, in order.

        Raises:
            EngineStopped: as `generate`; or a temperature that servers do not score at.
        """
        if temperature != 1.0:
            raise EngineStopped(f"score: temperature={temperature}: SGLang scores at 1 only")
        return [tuple(one.logprobs.tolist()) for one in self._together(lambda fleet: fleet.score_all(given))]

    def abort(self) -> None:
        """Let `generate` return what it has; only on the first rank it has an effect."""
        if self._live is not None:
            self._live.abort()

    def load_weights(self, student: HoldsWeights, version: int) -> None:
        """Push to every server that reacts; one that is being restarted gets them when it answers.

        Weights of the very folder that servers were started with (`WholeWeights.folder`) are there already.

        Raises:
            EngineStopped: on every rank; no server could be given them, or one computes something else with them.
        """
        self._student, self.version = student, version
        self._push(everyone=True)

    def close(self) -> None:
        """End the servers that the run has started, and let go of others."""
        if self._sync is not None and self._leaves:
            self._sync.close()
        if self._live is not None:
            self._live.close()

    def _together(self, ask: Callable[[Fleet], Coroutine[Any, Any, list[Any]]]) -> list[Any]:
        """What the first rank's fleet answers, on every rank; servers that wait for weights get them meanwhile."""
        if self._student is None:
            raise EngineStopped("the engine has no weights yet; publish the student before asking for rollouts")
        work = None if self._live is None else self._live.begin(ask)
        while True:
            outcome = None
            if self._live is not None:
                assert work is not None
                pushes = not self.weights_come_from_elsewhere
                outcome = self._live.wait(work, seconds=REPORT_SECONDS, pushes=pushes)
            outcome = self._ranks.gather_objects(outcome)[0]
            assert outcome is not None
            if outcome.failure is not None:
                raise EngineStopped(str(outcome.failure)) from outcome.failure
            if outcome.results is not None:
                return outcome.results
            if outcome.need is Need.WEIGHTS:
                self._push(everyone=False)

    def _push(self, *, everyone: bool) -> None:
        """Push the weights in force until they are where they should be; a server that is lost over it is restarted."""
        while True:
            outcome = None
            if self._live is not None:
                outcome = self._live.begin_push(self.version, everyone=everyone, seconds=REPORT_SECONDS)
            outcome = self._pushing.gather_objects(outcome)[0]
            assert outcome is not None
            if outcome.failure is not None:
                raise EngineStopped(str(outcome.failure)) from outcome.failure
            if outcome.results is not None and self._pushed(outcome.results):
                return
            if outcome.results is None and not everyone:
                return  # the one that needed them has gone again

    def _pushed(self, addresses: list[Address]) -> bool:
        """Whether all of these hold the weights now."""
        try:
            self._move(addresses)
        except SyncError as error:
            if self._live is not None:
                self._live.break_push(addresses, error.servers, str(error))
            if not error.servers:
                raise EngineStopped(str(error)) from error
            return False
        if self._live is not None:
            self._live.end_push(addresses, self.version)
        return True

    def _move(self, addresses: list[Address]) -> None:
        """Bring the weights to the servers, or see that they are there.

        Raises:
            SyncError: on every rank.
        """
        if isinstance(self._student, WholeWeights) and self._student.folder == self._folder:
            failure = None if self._live is None else self._live.name_own_weights(addresses, self.version)
            if told := self._pushing.gather_objects(failure)[0]:
                raise told
        elif self._sync is None or not isinstance(self._student, Student):
            raise SyncError(f"a {type(self._student).__name__} cannot be pushed: it takes a Student, and Serving.mesh")
        else:
            self._sync.push(self._student, addresses, self.version)
