"""The student answers the prompts itself: on-policy rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from megatron_distill.errors import DataError
from megatron_distill.rollout.base import random_source
from megatron_distill.rollout.demonstrate import check_solutions, demonstrate
from megatron_distill.rollout.sources._writing import Writer, Writing
from megatron_distill.rollout.sources.base import Surroundings
from megatron_distill.types import Origin, Prompt, Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate(Writing):
    """Responses of the student with its newest weights, scored."""

    on_policy_fraction: float = 1.0
    """Share of steps with responses of the student; the others have the data's solutions (GKD's lambda)."""
    max_solution_tokens: int = 4096
    """Of the data's solutions in off-policy steps; a longer one is cut, and then has no end-of-sequence token."""
    keep_groups: Literal["all", "mixed"] = "all"
    """`mixed` leaves out groups whose rewards are all alike, and asks further prompts in their place until the step
    has its `train.prompts_per_step` groups (DAPO's dynamic sampling, arXiv 2503.14476)."""
    most_rounds: int = 10
    """With `keep_groups: mixed`, how often a step may ask for prompts before the run stops."""

    def __post_init__(self) -> None:
        Writing.__post_init__(self)
        if not 0 <= self.on_policy_fraction <= 1:
            raise ValueError(f"on_policy_fraction={self.on_policy_fraction}: must be from 0 to 1")
        for name in ("most_rounds", "max_solution_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.keep_groups == "mixed" and self.samples_per_prompt < 2:
            raise ValueError(f"samples_per_prompt={self.samples_per_prompt}: keep_groups=mixed needs 2 or more")

    @property
    def origins(self) -> frozenset[Origin]:
        """The student's, and the data's where a step may be off-policy."""
        return frozenset({Origin.STUDENT} if self.on_policy_fraction == 1 else {Origin.STUDENT, Origin.CONSTRUCTED})

    @property
    def needs_reward(self) -> bool:
        """To tell which groups are mixed."""
        return self.keep_groups == "mixed"

    def connect(self, surroundings: Surroundings) -> Generating:
        """With an engine that has no weights yet: publish the student first.

        Raises:
            DataError: prompts lack the answers or solutions that these settings need.
        """
        if self.on_policy_fraction < 1:
            check_solutions(list(surroundings.prompts))
        return Generating(self, surroundings)


class Generating(Writer):
    """The live source."""

    def __init__(self, part: Generate, surroundings: Surroundings) -> None:
        super().__init__(part, surroundings)
        self._part = part

    def write(self, step: int) -> list[Scored]:
        """One group per prompt."""
        on_policy = random_source((self._run.seed, "on-policy", step)).random() < self._part.on_policy_fraction
        if not on_policy:
            return self._demonstrated(self.take(self._run.prompts_per_step))
        if self._part.keep_groups == "all":
            return self.answers(step, self.take(self._run.prompts_per_step))
        return self._mixed(step)

    def _mixed(self, step: int) -> list[Scored]:
        kept: list[Scored] = []
        missing = self._run.prompts_per_step
        for _ in range(self._part.most_rounds):
            scored = self.answers(step, self.take(missing))
            for _, members in groupby(scored, key=lambda one: one.rollout.group):
                group = list(members)
                if len({one.reward for one in group} - {None}) > 1:
                    kept += group
                    missing -= 1
            if not missing:
                return kept
        raise DataError(
            f"step {step}: after rollout.most_rounds={self._part.most_rounds} rounds {missing} of "
            f"{self._run.prompts_per_step} groups still have rewards that are all alike: the prompts are too hard or "
            "too easy for the student; choose others, raise most_rounds or samples_per_prompt, or set keep_groups=all"
        )

    def _demonstrated(self, chosen: list[tuple[str, Prompt]]) -> list[Scored]:
        return [
            demonstrate(
                self._run.tokenizer,
                prompt,
                group=group,
                version=self.engine.version,
                max_tokens=self._part.max_solution_tokens,
            )
            for group, prompt in chosen
        ]
