"""The student answers the prompts itself: on-policy rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from megatron_distill.data.traces import write_traces
from megatron_distill.rollout.base import RolloutEngine, Sampling, random_source
from megatron_distill.rollout.demonstrate import check_solutions, demonstrate
from megatron_distill.rollout.embedded import EmbeddedSettings
from megatron_distill.rollout.sample import Tools, Wanted, check_answers, sample
from megatron_distill.rollout.sources.base import HoldsWeights, SourcePart, Surroundings, take
from megatron_distill.types import Origin, Prompt, Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate(SourcePart):
    """Responses of the student with its newest weights, scored."""

    gives_logprobs: ClassVar[bool] = True

    samples_per_prompt: int = 1
    """Responses to each prompt of a step; together they are a group."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the tokens are drawn."""
    on_policy_fraction: float = 1.0
    """Share of steps with responses of the student; the others have the data's solutions (GKD's lambda)."""
    engine: EmbeddedSettings = field(default_factory=EmbeddedSettings)
    """What writes the responses."""
    record: bool = False
    """Write every rollout to `traces/` of the run folder, to be replayed."""

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt={self.samples_per_prompt}: must be at least 1")
        if not 0 <= self.on_policy_fraction <= 1:
            raise ValueError(f"on_policy_fraction={self.on_policy_fraction}: must be from 0 to 1")

    @property
    def origins(self) -> frozenset[Origin]:
        """The student's, and the data's where a step may be off-policy."""
        return frozenset({Origin.STUDENT} if self.on_policy_fraction == 1 else {Origin.STUDENT, Origin.CONSTRUCTED})

    def connect(self, surroundings: Surroundings) -> Generating:
        """With an engine that has no weights yet: publish the student first.

        Raises:
            DataError: prompts lack the answers or solutions that these settings need.
        """
        check_answers(surroundings.verifier, surroundings.prompts.items)
        if self.on_policy_fraction < 1:
            check_solutions(list(surroundings.prompts))
        return Generating(self, surroundings)


class Generating:
    """The live source."""

    def __init__(self, part: Generate, surroundings: Surroundings) -> None:
        self._part = part
        self._run = surroundings
        self._cursor = surroundings.cursor()
        self._tools = Tools(
            engine=part.engine.connect(
                surroundings.student_folder,
                surroundings.tokenizer,
                valid_vocab=surroundings.valid_vocab,
                device=surroundings.device,
            ),
            judge=surroundings.verifier.connect(),
            tokenizer=surroundings.tokenizer,
            ranks=surroundings.ranks,
        )

    @property
    def engine(self) -> RolloutEngine:
        """Writes the responses."""
        return self._tools.engine

    def next(self, step: int) -> list[Scored]:
        """One group per prompt, by group and sample; the same on every rank."""
        chosen, self._cursor = take(self._cursor, self._run.prompts, self._run.prompts_per_step)
        on_policy = random_source((self._run.seed, "on-policy", step)).random() < self._part.on_policy_fraction
        scored = self._sampled(step, chosen) if on_policy else self._demonstrated(chosen)
        if self._part.record and self._run.ranks.rank == 0:
            write_traces(self._run.traces, step, scored)
        return scored

    def _sampled(self, step: int, chosen: list[tuple[str, Prompt]]) -> list[Scored]:
        wanted = [
            Wanted(
                prompt=prompt,
                group=group,
                sample=index,
                sampling=self._part.sampling,
                key=(self._run.seed, "rollout", step, group, prompt.id, index),
            )
            for group, prompt in chosen
            for index in range(self._part.samples_per_prompt)
        ]
        return sample(self._tools, wanted)

    def _demonstrated(self, chosen: list[tuple[str, Prompt]]) -> list[Scored]:
        return [
            demonstrate(
                self._run.tokenizer,
                prompt,
                group=group,
                version=self.engine.version,
                max_tokens=self._part.sampling.max_new_tokens,
            )
            for group, prompt in chosen
        ]

    def publish(self, student: HoldsWeights, version: int) -> None:
        """Hand the student's weights to the engine."""
        self.engine.load_weights(student.weights(), version)

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
        """End the verifier's processes."""
        self._tools.judge.close()
