"""Rollouts written ahead of training: a thread asks the source for coming steps while the student learns from this one.

The batch of step t is begun when training comes to step t - depth, so no token of it was sampled with weights of more
than `depth` updates before. Every rank has such a thread. Its exchanges run over a process group of their own, so that
they never come between training's; what moves weights stays in the main thread. What is drawn depends on seed, step,
prompt and sample as ever. `on_update` says what new weights find:

    wait       a batch is written with one version from end to end: weights go over between two of them. With depth 1
               the batch of step t is always written with the weights of t - 1 updates.
    continue   weights go over at once; responses in the middle of being written are kept and go on with the new ones,
               and each of their tokens has its own version. Only an engine that can do so.

A checkpoint holds the place in the prompts behind the last batch that was *handed over*: those written ahead of a run
that is lost are written again, by the same prompts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from megatron_distill.errors import ConfigError, DistillError, EngineError, EngineStopped
from megatron_distill.rollout.base import Completion, Given, HoldsWeights, Request, RolloutEngine
from megatron_distill.rollout.sample import Ranks
from megatron_distill.rollout.sources.base import Source
from megatron_distill.types import Scored

LOOK_SECONDS = 0.5
"""Between two exchanges of the ranks about how their threads are doing, while they wait for them."""
GRACE_SECONDS = 5.0
"""For a batch to be finished when a run ends in the middle of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchSettings:
    """Rollouts written ahead of training."""

    depth: int = 0
    """Batches written ahead, and how many updates a token's weights may be behind; 0 writes when a step begins, with
    the newest weights. Stale tokens want `train.importance`, or an objective with `old_logprobs: rollout`."""
    on_update: Literal["wait", "continue"] = "wait"
    """What new weights wait for: `wait` for the batch that is being written, `continue` for nothing; responses then go
    on with new weights in their middle (not with the embedded engine)."""

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ValueError(f"depth={self.depth}: must be 0 (none) or more")
        if self.depth == 0 and self.on_update != "wait":
            raise ValueError(f"on_update={self.on_update}: with depth=0 nothing is written while weights change")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """How a rank's thread is doing; goes to all ranks."""

    done: bool
    """Whether it has written what is waited for."""
    needs_weights: bool = False
    error: str | None = None
    of_engine: bool = False
    """Whether the error is an engine's, of which a run saves a checkpoint: all ranks must think the same of it."""


@dataclass(frozen=True, slots=True)
class _Written:
    """A batch, and the source's state behind it."""

    scored: list[Scored]
    state: dict[str, int]
    seconds: float
    """That it took, beside training."""


class Prefetch:
    """A source whose batches are written ahead; its methods are called from the main thread."""

    def __init__(self, source: Source, settings: PrefetchSettings, ranks: Ranks, steps: int) -> None:
        """Nothing runs before the first `next`.

        Args:
            source: connected to ranks over a group of their own, and a tokenizer of its own.
            settings: `depth` 1 or more.
            ranks: the main threads', over another group.
            steps: of the whole run; nothing is written for later ones.

        Raises:
            ConfigError: the engine cannot go on with new weights in the middle of a response.
        """
        engine = source.engine
        self._serves = engine is not None and engine.updates_in_flight
        if settings.on_update == "continue" and not self._serves:
            raise ConfigError(
                "rollout.prefetch.on_update=continue: this engine cannot take weights while it writes: "
                "set rollout.engine.kind=sglang, or rollout.prefetch.on_update=wait"
            )
        self._source, self._settings, self._ranks, self._steps = source, settings, ranks, steps
        self._engine = None if engine is None else BetweenBatches(engine, self)
        self._state = source.state()
        self._seconds = 0.0
        self._weights: tuple[HoldsWeights, int] | None = None
        self._pending = False  # weights that the engine does not have yet
        self._resting = True  # no batch is begun before the next `next`; the same on all ranks, as all but these are:
        self._gate = threading.Condition()
        self._begun = 0
        self._limit = 0  # batches of earlier steps may be begun
        self._closed = False
        self._grace = GRACE_SECONDS
        self._batches: dict[int, Future[_Written]] = {}
        self._thread: threading.Thread | None = None
        self._push_elsewhere(True)

    @property
    def engine(self) -> RolloutEngine | None:
        """What writes the responses; it answers others between two batches."""
        return self._engine

    @property
    def depth(self) -> int:
        """Batches written ahead."""
        return self._settings.depth

    def next(self, step: int) -> list[Scored]:
        """The batch of `step`, waited for if need be; later ones are begun.

        Raises:
            DistillError: what ended a thread, on every rank.
        """
        if self._thread is None:
            self._begin(step)
        if self._pending:
            self._settle(step + 1)
        self._resting = False
        self._open(step + self._settings.depth + 1)
        self._wait_for(step + 1)
        written = self._batches.pop(step).result()
        self._state, self._seconds = written.state, written.seconds
        return written.scored

    @property
    def seconds(self) -> float:
        """In which the batch that was handed over last was written, however little of it training waited for."""
        return self._seconds

    def publish(self, student: HoldsWeights, version: int) -> None:
        """From the next batch on write with these weights; with `on_update: continue`, from now on.

        `wait` hands them over in the next `next`, which waits for the batch anyhow: until then the student may not
        change.
        """
        self._weights, self._pending = (student, version), True
        if self._resting or self._settings.on_update == "continue":
            self._push()

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """Nothing is written in here, and the engine may ask its caller for weights."""
        self.rest()
        self._push_elsewhere(False)
        try:
            yield
        finally:
            self._push_elsewhere(True)

    def rest(self) -> None:
        """Write nothing from the end of the batch that is being written, which is waited for, to the next `next`."""
        if not self._resting:
            self._settle(0)
            self._resting = True

    def state(self) -> dict[str, int]:
        """Behind the last batch that was handed over."""
        return self._state

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on behind that batch; before the first `next`."""
        assert self._thread is None, "batches are being written already"
        self._source.restore(state)
        self._state = self._source.state()

    def close(self) -> None:
        """Write no more, and give back what the source holds; never waits for an answer that does not come."""
        with self._gate:
            self._closed = True
            self._gate.notify_all()
        if self._source.engine is not None and self._thread is not None and self._thread.is_alive():
            with suppress(EngineError):  # of servers that are gone, too
                self._source.engine.abort()
        self._join()
        self._source.close()
        self._join()

    # -- the main thread ---------------------------------------------------------------------------------------------

    def _begin(self, step: int) -> None:
        self._begun = self._limit = step
        self._thread = threading.Thread(target=self._write, args=(step,), name="rollouts ahead", daemon=True)
        self._thread.start()

    def _open(self, limit: int) -> None:
        """Let batches below `limit` be begun."""
        with self._gate:
            for step in range(self._limit, min(limit, self._steps)):
                self._batches[step] = Future()
            self._limit = max(self._limit, min(limit, self._steps))
            self._gate.notify_all()

    def _settle(self, least: int) -> None:
        """Stop behind the batches that any rank has begun, at least behind `least`; then hand over new weights.

        Batches are begun rank by rank and written by all together: every rank must stop behind the same one.
        """
        with self._gate:
            allowed, self._limit = self._limit, self._begun
        limit = max([least, *self._ranks.gather_objects(self._limit)])
        assert limit <= allowed, f"batches before {limit} cannot have been begun: those before {allowed} might"
        with self._gate:
            # those that were allowed, and not begun, wait until they are allowed again
            for step in range(limit, allowed):
                del self._batches[step]
            self._limit = limit
            self._gate.notify_all()
        self._wait_for(limit)
        if self._pending:
            self._push()

    def _push(self) -> None:
        assert self._weights is not None
        self._source.publish(*self._weights)
        self._pending = False

    def _wait_for(self, end: int) -> None:
        """Until all batches before `end` are written on every rank.

        Raises:
            DistillError: one cannot be, on every rank alike.
        """
        wanted = [future for step, future in self._batches.items() if step < end]
        while True:
            _, missing = wait(wanted, timeout=LOOK_SECONDS)
            looks = self._ranks.gather_objects(self._look(wanted, done=not missing))
            failed = [(rank, look) for rank, look in enumerate(looks) if look.error is not None]
            if failed:
                self._fail(wanted, *failed[0])
            if all(look.done for look in looks):
                return
            if any(look.needs_weights for look in looks):
                # a server was begun again: only the main threads can give it weights, and these are the newest
                self._push()

    def _look(self, wanted: Sequence[Future[_Written]], done: bool) -> _Look:
        error = _error_of(wanted)
        if error is not None:
            text = str(error) if isinstance(error, DistillError) else f"{type(error).__name__}: {error}"
            return _Look(done=True, error=text, of_engine=isinstance(error, EngineError))
        engine = self._source.engine
        return _Look(done=done, needs_weights=self._serves and engine is not None and engine.needs_weights)

    def _fail(self, wanted: Sequence[Future[_Written]], rank: int, look: _Look) -> None:
        self._grace = 0.0  # threads of other ranks may wait for the one that failed, for ever
        own, text = _error_of(wanted), f"rank {rank}: {look.error}"
        if look.of_engine:
            raise own if isinstance(own, EngineStopped) else EngineStopped(text) from own
        if own is not None and not isinstance(own, EngineError):
            raise own
        raise DistillError(text) from own

    def _push_elsewhere(self, elsewhere: bool) -> None:
        """Whether the engine, when a server wants weights, leaves that to the main thread."""
        if self._serves and self._source.engine is not None:
            self._source.engine.weights_come_from_elsewhere = elsewhere

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join(self._grace)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _write(self, first: int) -> None:
        for step in range(first, self._steps):
            with self._gate:
                self._gate.wait_for(lambda step=step: step < self._limit or self._closed)  # type: ignore[misc]
                if self._closed:
                    return
                self._begun = step + 1
                batch = self._batches[step]
            begun = time.perf_counter()
            try:
                scored = self._source.next(step)
                batch.set_result(_Written(scored, self._source.state(), time.perf_counter() - begun))
            except BaseException as error:  # nobody sees what ends a thread: the main thread raises it
                batch.set_exception(error)
                return


class BetweenBatches:
    """An engine for others than the source, such as evaluation: first the batch that is being written is finished."""

    def __init__(self, engine: RolloutEngine, prefetch: Prefetch) -> None:
        self._engine = engine
        self._prefetch = prefetch
        self.everywhere = engine.everywhere
        self.updates_in_flight = engine.updates_in_flight
        self.weights_come_from_elsewhere = False

    @property
    def needs_weights(self) -> bool:
        """Whether a part of it waits for the weights in force."""
        return self._engine.needs_weights

    @property
    def figures(self) -> Mapping[str, float]:
        """What it has to tell of itself, and how long it wrote."""
        return {**self._engine.figures, "writing_s": self._prefetch.seconds}

    @property
    def version(self) -> int:
        """Optimizer steps behind its weights."""
        return self._engine.version

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        with self._prefetch.between_batches():
            return self._engine.generate(requests)

    def score(self, given: Sequence[Given], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """Log-probs of `tokens[start:]` of each, in order."""
        with self._prefetch.between_batches():
            return self._engine.score(given, temperature)

    def abort(self) -> None:
        """Let `generate` return at once."""
        self._engine.abort()

    def load_weights(self, student: HoldsWeights, version: int) -> None:
        """Take every parameter by its Hugging Face name; collective."""
        with self._prefetch.between_batches():
            self._engine.load_weights(student, version)

    def close(self) -> None:
        """Left to the source, whose engine it is."""


def _error_of(batches: Sequence[Future[_Written]]) -> BaseException | None:
    """What ended the thread, if anything has."""
    errors = (batch.exception() for batch in batches if batch.done())
    return next((error for error in errors if error is not None), None)
