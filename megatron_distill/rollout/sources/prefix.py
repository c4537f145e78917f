"""The teacher begins a response and the student goes on: guidance that fades along a cosine (TrOPD, arXiv 2606.01249).

The teacher's responses are text in the data, written beforehand: `hint` names them. In step s of S a response starts
with at most `prefix_length(s, S, longest)` of the teacher's tokens. A teacher's response that ends within that length
leaves nothing to go on from, and is learned from as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_distill.data.templates import end_of_sequence
from megatron_distill.errors import DataError
from megatron_distill.rollout.prefix import prefix_length
from megatron_distill.rollout.sample import Start, Wanted, sample
from megatron_distill.rollout.sources._writing import Writer, Writing
from megatron_distill.rollout.sources.base import Surroundings
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix(Writing):
    """Responses of the student that begin with the teacher's text, less of it from step to step."""

    hint: str = "solution"
    """Which hint of a prompt is the teacher's response: `solution` (data.solution_key), or one of data.hint_keys."""
    longest: int | None = None
    """Tokens of the teacher's in step 0; null: `sampling.max_new_tokens`, which bounds start and continuation."""
    steps: int | None = None
    """Step from which on the student writes everything; null: `train.steps`, which a longer run then moves."""

    def __post_init__(self) -> None:
        Writing.__post_init__(self)
        if self.longest is not None and not 0 <= self.longest <= self.sampling.max_new_tokens:
            raise ValueError(
                f"longest={self.longest}: must be from 0 to sampling.max_new_tokens={self.sampling.max_new_tokens}"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}: must be at least 1")

    @property
    def origins(self) -> frozenset[Origin]:
        """The teacher's and the student's."""
        return frozenset({Origin.TEACHER, Origin.STUDENT})

    def connect(self, surroundings: Surroundings) -> Prefixing:
        """With an engine that has no weights yet: publish the student first.

        Raises:
            DataError: a prompt has no response of the teacher's.
        """
        check_beginnings(self, surroundings.prompts.items)
        return Prefixing(self, surroundings)


def check_beginnings(part: Prefix, prompts: Sequence[Prompt]) -> None:
    """Before the run starts.

    Raises:
        DataError: a prompt has no response of the teacher's.
    """
    without = [prompt.id for prompt in prompts if part.hint not in prompt.hints]
    if without:
        raise DataError(
            f"{len(without)} of {len(prompts)} prompts have no hint {part.hint!r} to begin with, the first is "
            f"{without[0]}; name the teacher's responses in data.solution_key or data.hint_keys"
        )


class Prefixing(Writer):
    """The live source."""

    def __init__(self, part: Prefix, surroundings: Surroundings) -> None:
        super().__init__(part, surroundings)
        self._part = part

    def write(self, step: int) -> list[Scored]:
        """One group per prompt; every response of a group begins alike."""
        longest = self._part.sampling.max_new_tokens if self._part.longest is None else self._part.longest
        length = prefix_length(step, self._part.steps or self._run.steps, longest)
        wanted, whole = [], []
        for group, prompt in self.take(self._run.prompts_per_step):
            tokens = self._teacher_tokens(prompt)
            if len(tokens) <= length:
                whole.append(self._whole(group, prompt, tokens))
            else:
                wanted += self._continued(step, group, prompt, tokens[:length])
        return sorted(sample(self._tools, wanted) + whole, key=lambda one: (one.rollout.group, one.rollout.sample))

    def _continued(self, step: int, group: str, prompt: Prompt, start: tuple[int, ...]) -> list[Wanted]:
        sampling = self._part.sampling
        return [
            Wanted(
                prompt=prompt,
                group=group,
                sample=index,
                sampling=replace(sampling, max_new_tokens=sampling.max_new_tokens - len(start)),
                key=self.key(step, group, prompt, index),
                start=Start.by(Origin.TEACHER, start),
            )
            for index in range(self._part.samples_per_prompt)
        ]

    def _whole(self, group: str, prompt: Prompt, tokens: tuple[int, ...]) -> Scored:
        """The teacher's response leaves nothing to write."""
        ended = tokens[-1] == end_of_sequence(self._run.tokenizer)
        return Scored(
            rollout=Rollout(
                prompt=prompt,
                group=group,
                sample=0,
                tokens=tokens,
                logprobs=None,
                origin=(Origin.TEACHER,) * len(tokens),
                stop=Stop.EOS if ended else Stop.LENGTH,
                version=self.engine.version,
                text=prompt.hints[self._part.hint],
            ),
            reward=None,
        )

    def _teacher_tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """The teacher's response and its end of sequence, as far as a response may go."""
        text = self._run.tokenizer(prompt.hints[self._part.hint], add_special_tokens=False, verbose=False)
        tokens = (*text["input_ids"], end_of_sequence(self._run.tokenizer))
        return tokens[: self._part.sampling.max_new_tokens]
