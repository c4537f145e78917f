"""What sources share in which the student itself writes: an engine, its newest weights, a record of what it wrote."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from megatron_distill.data.traces import write_traces
from megatron_distill.rollout.base import HoldsWeights, Key, RolloutEngine, Sampling
from megatron_distill.rollout.engines.base import EnginePart, Serving
from megatron_distill.rollout.engines.embedded import Embedded
from megatron_distill.rollout.prefetch import PrefetchSettings
from megatron_distill.rollout.sample import Tools, Wanted, check_answers, sample
from megatron_distill.rollout.sources.base import SourcePart, Surroundings, Walking
from megatron_distill.types import Prompt, Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing(SourcePart):
    """A source that writes with the student's newest weights, and scores what it wrote."""

    gives_logprobs: ClassVar[bool] = True

    samples_per_prompt: int = 1
    """Responses to each prompt of a step; together they are a group."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the tokens are drawn."""
    engine: EnginePart = field(default_factory=Embedded)
    """What writes the responses; `kind` embedded where none is named."""
    prefetch: PrefetchSettings = field(default_factory=PrefetchSettings)
    """Rollouts written ahead of training; none where it is left out."""
    record: bool = False
    """Write every rollout to `traces/` of the run folder, to be replayed."""

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt={self.samples_per_prompt}: must be at least 1")


class Writer(Walking, ABC):
    """A live one; its engine has no weights yet: publish the student first."""

    def __init__(self, part: Writing, surroundings: Surroundings) -> None:
        """Collective.

        Raises:
            DataError: prompts lack the answers that the verifier compares with.
        """
        check_answers(surroundings.verifier, surroundings.prompts.items)
        super().__init__(surroundings)
        self._writing = part
        self._tools = Tools(
            engine=part.engine.connect(
                Serving(
                    folder=surroundings.student_folder,
                    tokenizer=surroundings.tokenizer,
                    ranks=surroundings.ranks,
                    mesh=surroundings.mesh,
                    valid_vocab=surroundings.valid_vocab,
                    device=surroundings.device,
                    run_folder=surroundings.run_folder,
                )
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
        """The groups of a step, by group and sample; the same on every rank."""
        scored = self.write(step)
        if self._writing.record and self._run.ranks.rank == 0:
            write_traces(self._run.traces, step, scored)
        return scored

    @abstractmethod
    def write(self, step: int) -> list[Scored]:
        """The step's scored rollouts; `take` says what to ask."""

    def answers(self, step: int, chosen: list[tuple[str, Prompt]]) -> list[Scored]:
        """The student's own responses to these prompts, `samples_per_prompt` to each."""
        wanted = [
            Wanted(
                prompt=prompt,
                group=group,
                sample=index,
                sampling=self._writing.sampling,
                key=self.key(step, group, prompt, index),
            )
            for group, prompt in chosen
            for index in range(self._writing.samples_per_prompt)
        ]
        return sample(self._tools, wanted)

    def key(self, step: int, group: str, prompt: Prompt, sample: int) -> Key:
        """Names the draws of one response."""
        return (self._run.seed, "rollout", step, group, prompt.id, sample)

    def publish(self, student: HoldsWeights, version: int) -> None:
        """Hand the student's weights to the engine."""
        self.engine.load_weights(student, version)

    def close(self) -> None:
        """End the engine, and the verifier's processes."""
        self._tools.engine.close()
        self._tools.judge.close()
