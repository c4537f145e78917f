"""The data's worked solutions as responses: what supervised fine-tuning learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_distill.rollout.demonstrate import check_solutions, demonstrate
from megatron_distill.rollout.sources.base import FromData, SourcePart, Surroundings
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


class Demonstrating(FromData):
    """The live source."""

    def __init__(self, part: Demonstrations, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self._part = part

    def next(self, step: int) -> list[Scored]:
        """One demonstration per prompt."""
        return [
            demonstrate(
                self._run.tokenizer,
                prompt,
                group=group,
                version=self._version,
                max_tokens=self._part.max_response_tokens,
            )
            for group, prompt in self.take(self._run.prompts_per_step)
        ]
