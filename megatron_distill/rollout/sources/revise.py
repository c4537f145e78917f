"""The student answers, is told whether it was right, and answers again: traces for SD-Zero's revision training.

A trace is one response: first answer (without its end of sequence), control phrase, revised answer. Only traces whose
revised answer is right are kept; the verdict is on the revised text alone, and a first answer that was cut off is
never revised, for its error is its length. Answers that end in a loop, and copies of a trace, are left out likewise.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from megatron_distill.data.phrases import Phrases
from megatron_distill.errors import DataError
from megatron_distill.models.spec import ModelSpec
from megatron_distill.rollout.reflection import loops
from megatron_distill.rollout.sample import Start, Wanted, sample
from megatron_distill.rollout.sources._writing import Writer, Writing
from megatron_distill.rollout.sources.base import Surroundings
from megatron_distill.types import Origin, Prompt, Scored, Stop

UNFIT = ("unscored", "cut_off", "loops", "no_room")
"""Why a first answer is not revised, in the order in which it is checked; `no_room`: prompt, answer, phrase and
revision would have been longer than model or servers have room for. A kept trace has, as facts, their shares in the
step's first answers."""


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
        self._room = part.engine.room(ModelSpec.from_folder(surroundings.student_folder).max_positions)

    def write(self, step: int) -> list[Scored]:
        """All kept traces of `train.prompts_per_step` prompts."""
        for _ in range(self._part.most_rounds):
            kept = self._traces(step, self.take(self._run.prompts_per_step))
            if kept:
                return kept
        raise DataError(
            f"step {step}: in rollout.most_rounds={self._part.most_rounds} rounds of {self._run.prompts_per_step} "
            "prompts no revision was right: the student cannot correct itself on them; choose easier ones, or raise "
            "rollout.revisions or rollout.sampling.max_new_tokens, which with prompt and first answer must stay within "
            f"{self._room} tokens, the positions of the model or its servers"
        )

    def _traces(self, step: int, chosen: list[tuple[str, Prompt]]) -> list[Scored]:
        first = self.answers(step, chosen)
        unfit = [self._unfit(one) for one in first]
        fitting = [one for one, why in zip(first, unfit, strict=True) if why is None]
        revised = sample(self._tools, [wanted for one in fitting for wanted in self._revisions(step, one)])
        count = Counter(unfit)
        shares = {f"revise/{name}": count[name] / len(first) for name in UNFIT}
        kept: dict[str, list[Scored]] = {}
        seen: set[tuple[str, str]] = set()
        for one in revised:
            members = kept.setdefault(one.rollout.group, [])
            if len(members) == self._part.most_per_prompt or not self._usable(one):
                continue
            text = one.rollout.prompt.id, self._run.tokenizer.decode(one.rollout.tokens, skip_special_tokens=True)
            if not self._part.refuse_copies or text not in seen:
                seen.add(text)
                members.append(replace(one, facts={**one.facts, **shares}))
        return [one for members in kept.values() for one in members]

    def _usable(self, revised: Scored) -> bool:
        """Right, whole, and not a loop."""
        whole = revised.rollout.stop is Stop.EOS
        return revised.right and whole and not (self._part.refuse_loops and loops(revised.rollout.text))

    def _unfit(self, first: Scored) -> str | None:
        """One of `UNFIT`; None, if nothing is wrong with it."""
        rollout = first.rollout
        if first.reward is None:
            return "unscored"
        if rollout.stop is not Stop.EOS:
            return "cut_off"
        if self._part.refuse_loops and loops(rollout.text):
            return "loops"
        read = len(rollout.prompt.tokens) + len(self._start(first).tokens)
        return "no_room" if read + self._part.sampling.max_new_tokens > self._room else None

    def _start(self, first: Scored) -> Start:
        """What the student goes on from: its answer without the end of sequence, and the phrase."""
        rollout = first.rollout
        assert rollout.logprobs is not None
        assert first.reward is not None
        answer = Start(
            tokens=rollout.tokens[:-1],
            origin=rollout.origin[:-1],
            logprobs=rollout.logprobs[:-1],
            versions=rollout.versions[:-1],
        )
        return answer + Start.by(Origin.CONSTRUCTED, self._part.phrases.tokens(self._run.tokenizer, first.reward))

    def _revisions(self, step: int, first: Scored) -> list[Wanted]:
        rollout, part = first.rollout, self._part
        if first.right and not part.revise_right:
            return []
        start = self._start(first)
        samples = range(rollout.sample * part.revisions, (rollout.sample + 1) * part.revisions)
        return [
            Wanted(
                prompt=rollout.prompt,
                group=rollout.group,
                sample=index,
                sampling=part.sampling,
                key=(*self.key(step, rollout.group, rollout.prompt, index), "revision"),
                start=start,
                judge_start=False,
            )
            for index in samples
        ]
