"""A teacher too large to sit beside the student: SGLang servers run it, and are asked by HTTP.

A server reads context and response once, writes nothing, and says how likely each response token was and which ids
were likeliest at its place. Scoring starts at the response, so that what several responses have in common before it is
read once. The log-probs are those of the model itself, at temperature 1, whatever a server is told.

One rank of each data-parallel replica asks; the others of the last pipeline stage have its answers from it, bit for
bit. Servers either are there already (`urls`), or the first rank starts them, restarts those that die, and ends them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

import torch

from megatron_distill.errors import EngineError, EngineStopped, ServerLost
from megatron_distill.models.network import Network
from megatron_distill.models.student import Student
from megatron_distill.rollout.base import Given
from megatron_distill.rollout.sample import on_first_rank
from megatron_distill.rollout.server_settings import ServerSettings, is_loopback, read_api_key, server_python
from megatron_distill.rollout.sglang import Address, Scores
from megatron_distill.runtime.mesh import Mesh
from megatron_distill.teachers._scores import Where, leads, shared, where
from megatron_distill.teachers._served import ALIKE, Introduced, Outcome, Served, alive, ask, introduce
from megatron_distill.teachers._servers import Elsewhere, Servers, start
from megatron_distill.teachers._views import View
from megatron_distill.teachers.base import TeacherPart
from megatron_distill.types import Batch, Fidelity, Scored, TeacherSignal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class RemotePart(TeacherPart):
    """A model behind SGLang servers; of any size, and any family that SGLang knows."""

    beside_student: ClassVar[bool] = False

    model: Path
    """Hugging Face folder of the teacher: servers that the run starts load it; of others its config.json and tokenizer
    are compared with what is served."""
    top_k: int = 0
    """Likeliest ids that it names for each response token; 0: it gives the response token's log-prob alone."""
    urls: tuple[str, ...] = ()
    """Servers that run already, such as `http://127.0.0.1:30000`; empty: the run starts `servers`."""
    served_as: str | None = None
    """With `urls`: the path that the servers know the model by, if it is not `model`."""
    servers: ServerSettings = field(default_factory=ServerSettings)
    """Servers that the run starts on the first rank's machine; with `urls` only their `api_key_file` and
    `start_seconds` are read."""
    in_flight: int = 64
    """Requests at a time on each server, from each data-parallel replica."""
    request_seconds: float = 900.0
    """Longest that a server may take for one response."""
    silent_seconds: float = 30.0
    """A server that has not said for so long that it is there counts as dead."""
    most_restarts: int = 3
    """How often in a run servers may die, or be waited for, before the run stops."""
    trust_remote_code: bool = False
    """Let the folder's own Python build its tokenizer, and run its model on servers that the run starts."""
    view: View = field(default_factory=View)
    """What it reads before the response."""

    def __post_init__(self) -> None:
        for name, least in {"top_k": 0, "in_flight": 1, "most_restarts": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be {least} or more")
        for name in ("request_seconds", "silent_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.served_as is not None and not self.urls:
            raise ValueError(
                f"served_as={self.served_as}: the run starts the servers itself; leave it null, or set urls"
            )
        for url in self.urls:
            try:
                host = urlsplit(Address(url).url).hostname or ""
            except ValueError as error:
                raise ValueError(f"urls: {error}") from error
            if self.servers.api_key_file is None and not is_loopback(host):
                raise ValueError(
                    f"urls: {url} is reached over a network: start it with a key, and name the file with the key in "
                    "servers.api_key_file"
                )

    def check(self) -> None:
        """Whatever can be known of servers before a run starts.

        Raises:
            EngineError: the key cannot be read, or there is nothing to run servers with.
        """
        read_api_key(self.servers.api_key_file)
        if not self.urls:
            server_python(self.servers.python)

    @property
    def provides(self) -> Fidelity:
        """What `top_k` says."""
        return Fidelity.TOP_K if self.top_k else Fidelity.TOKEN

    @property
    def folder(self) -> Path:
        """Where its tokenizer lies."""
        return self.model

    def connect(self, student: Student, tokenizer: PreTrainedTokenizerBase, logs: Path | None = None) -> RemoteTeacher:
        """Start the servers, or find them, and see that they run the model that is named.

        Raises:
            EngineError: they do not start, are not there, or run another model.
        """
        runtime, key = student.network.runtime, read_api_key(self.servers.api_key_file)
        served = Served(
            model=self.model,
            served_as=self.served_as or str(self.model.resolve()),
            vocabulary=student.partition.valid,
            in_flight=self.in_flight,
            request_seconds=self.request_seconds,
            silent_seconds=self.silent_seconds,
        )
        servers: list[Servers] = []

        def find() -> tuple[list[str], Introduced]:
            servers.append(self._servers(served, key, runtime.backend.device, logs))
            addresses = [Address(url, key) for url in servers[0].urls]
            return servers[0].urls, introduce(served, addresses)

        try:
            urls, introduced = on_first_rank(runtime.mesh, find)
        except EngineError as error:
            for one in servers:
                one.close()
            raise EngineError(f"teacher {self.model}: {error}") from error
        return RemoteTeacher(
            part=self,
            mesh=runtime.mesh,
            device=runtime.backend.device,
            tokenizer=tokenizer,
            served=served,
            servers=servers[0] if servers else None,
            addresses=tuple(Address(url, key) for url in urls),
            introduced=introduced,
        )

    def _servers(self, served: Served, key: str | None, device: torch.device, logs: Path | None) -> Servers:
        if not self.urls:
            settings = self.servers
            if self.trust_remote_code:
                settings = replace(settings, arguments=(*settings.arguments, "--trust-remote-code"))
            return start(settings, self.model, "cpu" if device.type == "cpu" else "cuda", logs)
        addresses = [Address(url, key) for url in self.urls]
        return Elsewhere(
            urls=list(self.urls), seconds=self.servers.start_seconds, reacting=lambda: alive(served, addresses)
        )


@dataclass(slots=True, kw_only=True)
class RemoteTeacher:
    """The live teacher."""

    part: RemotePart
    mesh: Mesh
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    served: Served
    servers: Servers | None
    """On the first rank: who keeps them alive."""
    addresses: tuple[Address, ...]
    introduced: Introduced
    deaths: int = 0
    """Of servers so far."""

    @property
    def kept(self) -> Network | None:
        """None: its weights never change."""
        return None

    def fit(self, scored: list[Scored]) -> list[Scored]:
        """Rollouts that the servers can read in its view, cut where they must be; equal on all ranks as `scored` is.

        Raises:
            DataError: none is left, or a revision has no verdict at all.
        """
        return self.part.view.fit_all(self.tokenizer, scored, self.introduced.longest)

    def signal(self, batch: Batch) -> tuple[TeacherSignal, ...]:
        """What the servers say of the response tokens; collective.

        Raises:
            EngineStopped: on every rank, if servers die too often, do not come back, or answer what they should not.
        """
        wanted = dict(self._readings(batch)) if leads(self.mesh) else {}
        found: dict[Where, Scores] = {}
        while True:
            outcomes = self.mesh.gather_objects(self._ask(wanted, found))
            for outcome in outcomes:
                if outcome.failure is not None:
                    raise EngineStopped(f"teacher {self.part.model}: {outcome.failure}") from outcome.failure
            complete = all(outcome.complete for outcome in outcomes)
            if lost := list(dict.fromkeys(url for outcome in outcomes for url in outcome.lost)):
                self._revive(lost, complete)
            if complete:
                return shared(batch, found, self.part.top_k, self.mesh, self.device)

    def _readings(self, batch: Batch) -> Iterator[tuple[Where, Given]]:
        """What is to be scored of each response: its tokens, behind what the view shows."""
        for micro in batch.micro:
            for one in micro.sequences:
                context = self.part.view.context(self.tokenizer, one)
                yield where(one), Given(tokens=(*context, *one.rollout.tokens), start=len(context))

    def _ask(self, wanted: Mapping[Where, Given], found: dict[Where, Scores]) -> Outcome:
        """Ask for what is not yet in `found`, and put it there."""
        missing = [place for place in wanted if place not in found]
        if not missing:
            return Outcome(complete=True)

        def keep(index: int, scores: Scores) -> None:
            if scores.version != self.introduced.version:
                raise EngineError(
                    f"a server that was version {self.introduced.version!r} answered as {scores.version!r}: {ALIKE}"
                )
            found[missing[index]] = scores

        return ask(self.served, self.addresses, [wanted[place] for place in missing], self.part.top_k, keep)

    def _revive(self, lost: list[str], complete: bool) -> None:
        """Have servers that were lost back, and see that they still hold the same model; collective."""
        self.deaths += len(lost) if not self.part.urls else int(not complete)
        if self.deaths > self.part.most_restarts:
            raise EngineStopped(
                f"teacher {self.part.model}: lost {' and '.join(lost)}, loss number {self.deaths} of the run, "
                f"most_restarts={self.part.most_restarts} allows no more; see the servers' logs. Too little memory for "
                "the prompts in flight is the usual reason: lower in_flight or servers.max_total_tokens"
            )

        def revive() -> None:
            assert self.servers is not None
            self.servers.revive(lost)
            reacting = alive(self.served, self.addresses)
            introduce(self.served, [one for one in self.addresses if one.url in reacting], self.introduced)

        try:
            on_first_rank(self.mesh, revive)
        except ServerLost:
            pass  # gone again while it was looked at: the next round asks, and counts
        except EngineError as error:
            raise EngineStopped(f"teacher {self.part.model}: {error}") from error

    def after_step(self, student: Student, step: int) -> None:
        """Nothing."""

    def restored(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """End the servers that the run has started."""
        if self.servers is not None:
            self.servers.close()
