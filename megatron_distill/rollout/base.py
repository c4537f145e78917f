"""What every rollout engine answers: generate, score, and take new weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from megatron_distill.types import Stop, versions_of

type Key = tuple[int | str, ...]
"""Names one draw of randomness, e.g. (run seed, step, group, prompt id, sample index)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that hold this much probability; 1 draws from all."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 draws from all."""
    max_new_tokens: int = 256
    """Longest response; a longer one is cut, without an end-of-sequence token."""

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "must be 0 or more"),
            "top_p": (0 < self.top_p <= 1, "must be above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "must be 0 (all) or more"),
            "max_new_tokens": (self.max_new_tokens >= 1, "must be at least 1"),
        }
        for name, (fits, allowed) in checks.items():
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)}: {allowed}")

    @property
    def logprob_temperature(self) -> float:
        """Temperature of the log-probs that come with a completion: greedy ones are those of the model itself."""
        return self.temperature or 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One response wanted."""

    tokens: tuple[int, ...]
    """The prompt."""
    sampling: Sampling
    key: Key
    """Decides the draws: they are the same in any batch, on any rank, after any restart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One response."""

    tokens: tuple[int, ...]
    """The end-of-sequence id included when `stop` is EOS."""
    logprobs: tuple[float, ...]
    """At `Sampling.logprob_temperature`, over the whole vocabulary whatever top_p and top_k leave out."""
    stop: Stop
    version: int
    """Optimizer steps behind the oldest weights that wrote any of it."""
    versions: tuple[int, ...] = ()
    """The same for each token, where the weights changed while it was written; left out, `version` wrote it all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", versions_of(self.version, self.versions, len(self.tokens)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Tokens to be scored: those from `start` on, each given all before it."""

    tokens: tuple[int, ...]
    start: int


class HoldsWeights(Protocol):
    """What an engine takes its weights from."""

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """Hugging Face name and full tensor of every parameter; a collective."""
        ...


@dataclass(frozen=True, slots=True)
class WholeWeights:
    """Weights that this process can read whole, such as those of a model folder."""

    read: Callable[[], Iterable[tuple[str, Tensor]]]
    folder: Path | None = None
    """Model folder in which they lie just so, if there is one."""

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """Hugging Face name and full tensor of every parameter."""
        return self.read()


class RolloutEngine(Protocol):
    """A model that writes responses; calls take whole batches, an engine over HTTP sends them side by side."""

    @property
    def everywhere(self) -> bool:
        """Whether each rank has one of its own, which answers what that rank asks.

        Otherwise it is one for all: every rank calls `generate` and `score` with the same, and gets the same answers.
        """
        ...

    @property
    def updates_in_flight(self) -> bool:
        """Whether `load_weights` may be called, from another thread, while `generate` runs."""
        ...

    weights_come_from_elsewhere: bool
    """Set where another thread loads weights when `needs_weights`; otherwise `generate` sees to it by itself."""

    @property
    def needs_weights(self) -> bool:
        """Whether a part of it waits for the weights in force, having lost its own; maybe only this rank knows."""
        ...

    @property
    def figures(self) -> Mapping[str, float]:
        """What it has to tell of itself, by name, for the metrics; the first rank's count."""
        ...

    @property
    def version(self) -> int:
        """Optimizer steps behind its weights; -1 before the first `load_weights`."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        ...

    def score(self, given: Sequence[Given], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """Log-probs of `tokens[start:]` of each, in order."""
        ...

    def abort(self) -> None:
        """Let `generate` return at once, from any thread: what is not whole has `Stop.ABORTED` and may be empty."""
        ...

    def load_weights(self, student: HoldsWeights, version: int) -> None:
        """Take every parameter by its Hugging Face name; all of them or an error. Collective."""
        ...

    def close(self) -> None:
        """Give processes and memory back; collective."""
        ...


def random_source(key: Key) -> np.random.Generator:
    """Random numbers that depend on `key` and nothing else (counter-based Philox)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))
