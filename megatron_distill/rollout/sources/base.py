"""Where a step's scored rollouts come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

from megatron_distill.data.cursor import Cursor
from megatron_distill.data.prompts import Prompts
from megatron_distill.rewards.base import Verifier
from megatron_distill.rollout.base import HoldsWeights, RolloutEngine
from megatron_distill.rollout.sample import Ranks
from megatron_distill.runtime.mesh import Mesh
from megatron_distill.types import Origin, Prompt, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """The run that a source works in."""

    ranks: Ranks
    """For what ranks exchange while they write."""
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    verifier: Verifier
    student_folder: Path
    """Its config.json tells the engine the architecture."""
    valid_vocab: int
    """Ids from here on are padding that the trainer gives no probability, so the engine must not either."""
    run_folder: Path
    seed: int
    prompts_per_step: int
    steps: int
    """Of the whole run."""
    device: torch.device
    mesh: Mesh | None = None
    """The ranks that hold the student; an engine that is one for all ranks takes weights from there."""

    @property
    def traces(self) -> Path:
        """Where recorded rollouts go."""
        return self.run_folder / "traces"


class Source(Protocol):
    """A live source. `next`, `publish` and `close` are called on every rank together."""

    @property
    def engine(self) -> RolloutEngine | None:
        """What writes the responses, where one does."""
        ...

    def next(self, step: int) -> list[Scored]:
        """The scored rollouts of a step, equal and in the same order on all ranks."""
        ...

    def publish(self, student: HoldsWeights, version: int) -> None:
        """From now on write with these weights."""
        ...

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        ...

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from a checkpoint."""
        ...

    def close(self) -> None:
        """Give processes and memory back."""
        ...


class SourcePart(ABC):
    """A kind of source; subclasses are frozen dataclasses whose fields are the YAML keys."""

    gives_logprobs: ClassVar[bool]
    """Whether its rollouts may carry the log-probs of who wrote them."""
    gives_pairs: ClassVar[bool | None] = False
    """Whether every group is a chosen and a rejected response; None: only its data can tell."""

    @property
    @abstractmethod
    def origins(self) -> frozenset[Origin] | None:
        """Whose tokens its rollouts may hold; None: only its data can tell."""

    @property
    def needs_reward(self) -> bool:
        """Whether it chooses rollouts by their rewards."""
        return False

    @abstractmethod
    def connect(self, surroundings: Surroundings) -> Source:
        """The live source."""


class Walking:
    """A live source that goes through the prompts in order; its place among them is its state."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._run = surroundings
        self._cursor = Cursor(
            size=len(surroundings.prompts), seed=surroundings.seed, shuffle=surroundings.prompts.shuffle
        )

    def take(self, count: int) -> list[tuple[str, Prompt]]:
        """The next prompts, each with a group name that sorts and never comes again; they are then gone."""
        places, self._cursor = self._cursor.take(count)
        return [(f"{position:012d}", self._run.prompts[index]) for position, index in places]

    def state(self) -> dict[str, int]:
        """The place in the prompts."""
        return self._cursor.state()

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on at a saved place.

        Raises:
            CheckpointError: the data has changed.
        """
        self._cursor = self._cursor.restore(state)


class FromData(Walking):
    """One whose responses stand in the data: without an engine, and never stale."""

    engine = None

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self._version = 0

    def publish(self, student: HoldsWeights, version: int) -> None:
        """The responses count as written by the newest weights."""
        self._version = version

    def close(self) -> None:
        """Nothing to give back."""
