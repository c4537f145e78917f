"""The data's worked solutions as responses: what supervised fine-tuning learns from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from megatron_distill.rollout.demonstrate import check_solutions, demonstrate
from megatron_distill.rollout.sources.base import HoldsWeights, SourcePart, Surroundings, take
from megatron_distill.types import Origin, Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstrations(SourcePart):
    """One response per prompt, from the data; nothing is sampled or scored."""

    gives_logprobs: ClassVar[bool] = False

    max_response_tokens: int = 4096
    """A longer solution is cut, and then has no end-of-sequence token."""

    def __post_init__(self) -> None:
        if self.max_response_tokens < 1:
            raise ValueError(f"max_response_tokens={self.max_response_tokens}: must be at least 1")

    @property
    def origins(self) -> frozenset[Origin]:
        """The data's."""
        return frozenset({Origin.CONSTRUCTED})

    def connect(self, surroundings: Surroundings) -> Demonstrating:
        """The live source.

        Raises:
            DataError: a prompt has no solution.
        """
        check_solutions(list(surroundings.prompts))
        return Demonstrating(self, surroundings)


class Demonstrating:
    """The live source; it has no engine, so it takes no weights."""

    engine = None

    def __init__(self, part: Demonstrations, surroundings: Surroundings) -> None:
        self._part = part
        self._run = surroundings
        self._cursor = surroundings.cursor()
        self._version = 0

    def next(self, step: int) -> list[Scored]:
        """One demonstration per prompt."""
        chosen, self._cursor = take(self._cursor, self._run.prompts, self._run.prompts_per_step)
        return [
            demonstrate(
                self._run.tokenizer,
                prompt,
                group=group,
                version=self._version,
                max_tokens=self._part.max_response_tokens,
            )
            for group, prompt in chosen
        ]

    def publish(self, student: HoldsWeights, version: int) -> None:
        """Demonstrations never grow stale: they count as written by the newest weights."""
        self._version = version

    def state(self) -> dict[str, int]:
        """The place in the prompts."""
        return self._cursor.state()

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on at a saved place.

        Raises:
            CheckpointError: the data has changed.
        """
        self._cursor = self._cursor.restore(state)

    def close(self) -> None:
        """Nothing to give back."""
