"""The student answers, is told whether it was right, and answers again: traces for SD-Zero's revision training.

A trace is one response: first answer (without its end of sequence), control phrase, revised answer. Only traces whose
revised answer is right are kept; the verdict is on the revised text alone, and a first answer that was cut off is
never revised, for its error is its length. Answers that end in a loop, and copies of a trace, are left out likewise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_distill.data.phrases import Phrases
from megatron_distill.errors import DataError
from megatron_distill.rollout.reflection import loops
from megatron_distill.rollout.sample import Start, Wanted, sample
from megatron_distill.rollout.sources._writing import Writer, Writing
from megatron_distill.rollout.sources.base import Surroundings
from megatron_distill.types import Origin, Prompt, Scored, Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Revise(Writing):
    """Verified revisions of the student's own answers; `samples_per_prompt` counts first answers."""

    phrases: Phrases = field(default_factory=Phrases)
    """What the student reads after its first answer; a teacher's revision view must use the same."""
    revisions: int = 3
    """Tries at revising each first answer."""
    revise_right: bool = True
    """Let it rephrase right answers too; the released code corrects wrong ones only."""
    most_per_prompt: int | None = None
    """Keep at most so many traces of one prompt; null keeps all."""
    refuse_loops: bool = True
    """Do not revise a first answer that ends in the same piece three times over, nor keep such a revision. The released
    code cuts the repetitions off instead, so that the text ends where the student did not end it."""
    refuse_copies: bool = True
    """Keep a trace once per step where the student wrote the same answer and the same revision to a prompt again."""
    most_rounds: int = 10
    """How often a step may ask for further prompts while no trace at all was kept, before the run stops."""

    def __post_init__(self) -> None:
        Writing.__post_init__(self)
        for name in ("revisions", "most_rounds", "most_per_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")

    @property
    def origins(self) -> frozenset[Origin]:
        """The student's answers with a phrase between them."""
        return frozenset({Origin.STUDENT, Origin.CONSTRUCTED})

    @property
    def needs_reward(self) -> bool:
        """To choose the phrase and the traces."""
        return True

    def connect(self, surroundings: Surroundings) -> Revising:
        """With an engine that has no weights yet: publish the student first."""
        return Revising(self, surroundings)


class Revising(Writer):
    """The live source."""

    def __init__(self, part: Revise, surroundings: Surroundings) -> None:
        super().__init__(part, surroundings)
        self._part = part

    def write(self, step: int) -> list[Scored]:
        """All kept traces of `train.prompts_per_step` prompts."""
        for _ in range(self._part.most_rounds):
            kept = self._traces(step, self.take(self._run.prompts_per_step))
            if kept:
                return kept
        raise DataError(
            f"step {step}: in rollout.most_rounds={self._part.most_rounds} rounds of {self._run.prompts_per_step} "
            "prompts no revision was right: the student cannot correct itself on them; choose easier ones, or raise "
            "rollout.revisions or rollout.sampling.max_new_tokens"
        )

    def _traces(self, step: int, chosen: list[tuple[str, Prompt]]) -> list[Scored]:
        first = sample(
            self._tools,
            [
                Wanted(
                    prompt=prompt,
                    group=group,
                    sample=index,
                    sampling=self._part.sampling,
                    key=self.key(step, group, prompt, index),
                )
                for group, prompt in chosen
                for index in range(self._part.samples_per_prompt)
            ],
        )
        revised = sample(self._tools, [wanted for one in first for wanted in self._revisions(step, one)])
        kept: dict[str, list[Scored]] = {}
        seen: set[tuple[str, str]] = set()
        for one in revised:
            members = kept.setdefault(one.rollout.group, [])
            if len(members) == self._part.most_per_prompt or not self._usable(one):
                continue
            text = one.rollout.prompt.id, self._run.tokenizer.decode(one.rollout.tokens, skip_special_tokens=True)
            if not self._part.refuse_copies or text not in seen:
                seen.add(text)
                members.append(one)
        return [one for members in kept.values() for one in members]

    def _usable(self, revised: Scored) -> bool:
        """Right, whole, and not a loop."""
        whole = revised.rollout.stop is Stop.EOS
        return revised.reward == 1 and whole and not (self._part.refuse_loops and loops(revised.rollout.text))

    def _revisions(self, step: int, first: Scored) -> list[Wanted]:
        rollout, part = first.rollout, self._part
        right = first.reward == 1
        if first.reward is None or rollout.stop is not Stop.EOS or (right and not part.revise_right):
            return []
        if part.refuse_loops and loops(rollout.text):
            return []
        assert rollout.logprobs is not None
        answer = Start(tokens=rollout.tokens[:-1], origin=rollout.origin[:-1], logprobs=rollout.logprobs[:-1])
        phrase = Start.by(Origin.CONSTRUCTED, part.phrases.tokens(self._run.tokenizer, first.reward))
        samples = range(rollout.sample * part.revisions, (rollout.sample + 1) * part.revisions)
        return [
            Wanted(
                prompt=rollout.prompt,
                group=rollout.group,
                sample=index,
                sampling=part.sampling,
                key=(*self.key(step, rollout.group, rollout.prompt, index), "revision"),
                start=answer + phrase,
                judge_start=False,
            )
            for index in samples
        ]
