"""TAPO's rollouts: the student answers, and rebuilds some of its wrong answers with a right one at hand.

For a prompt with enough right and enough wrong responses, each of a few wrong ones is paired with a right one drawn at
random from the same group (never the data's solution), and the student itself is asked for a micro-reflective
trajectory (`rollout.reflection`). Those that pass its checks join the step under the plain prompt, every token
CONSTRUCTED, in a group of their own. Whether they are right is for their reward to say.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from megatron_distill.data.templates import render
from megatron_distill.models.spec import ModelSpec
from megatron_distill.rollout.base import Completion, Key, Request, random_source
from megatron_distill.rollout.reflection import FAILURES, INSTRUCTION, Checks, Reconstruction, reconstruct
from megatron_distill.rollout.sample import complete, shared
from megatron_distill.rollout.sources._writing import Writer, Writing
from megatron_distill.rollout.sources.base import Surroundings
from megatron_distill.types import Origin, Rollout, Scored, Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Reflect(Writing):
    """The student's responses, and its repairs of wrong ones."""

    samples_per_prompt: int = 8
    """Responses to each prompt of a step; together they are a group."""
    least_right: int = 2
    """Right responses a group must have to be repaired."""
    least_wrong: int = 4
    """Wrong responses it must have."""
    most_repairs: int = 4
    """Wrong responses of a group that are repaired at most, drawn at random; cut-off ones never are."""
    instruction: str = INSTRUCTION
    """What the student is asked, with places for {problem}, {wrong} and {right}."""
    thinking: bool | None = None
    """Value of `enable_thinking` for the chat template of that request; null: that of `data.thinking`."""
    checks: Checks = field(default_factory=Checks)
    """What a repair must pass."""

    def __post_init__(self) -> None:
        Writing.__post_init__(self)
        for name in ("least_right", "least_wrong", "most_repairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        missing = [place for place in ("{problem}", "{wrong}", "{right}") if place not in self.instruction]
        if missing:
            raise ValueError(f"instruction: has no place for {', '.join(missing)}")
        if self.least_right + self.least_wrong > self.samples_per_prompt:
            raise ValueError(
                f"least_right={self.least_right}: with least_wrong={self.least_wrong} more than "
                f"samples_per_prompt={self.samples_per_prompt}, no group could be repaired"
            )

    @property
    def origins(self) -> frozenset[Origin]:
        """The student's responses, and what it built."""
        return frozenset({Origin.STUDENT, Origin.CONSTRUCTED})

    @property
    def needs_reward(self) -> bool:
        """To tell right from wrong."""
        return True

    def connect(self, surroundings: Surroundings) -> Reflecting:
        """With an engine that has no weights yet: publish the student first."""
        return Reflecting(self, surroundings)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repair:
    """One wrong response and the right one that helps."""

    wrong: Scored
    right: Scored
    key: Key


class Reflecting(Writer):
    """The live source."""

    def __init__(self, part: Reflect, surroundings: Surroundings) -> None:
        super().__init__(part, surroundings)
        self._part = part
        self._room = part.engine.room(ModelSpec.from_folder(surroundings.student_folder).max_positions)

    def write(self, step: int) -> list[Scored]:
        """Every group, followed by its repairs."""
        originals = self.answers(step, self.take(self._run.prompts_per_step))
        groups = {name: list(members) for name, members in groupby(originals, key=lambda one: one.rollout.group)}
        eligible = {name for name, members in groups.items() if self._eligible(members)}
        repairs = [repair for name in groups if name in eligible for repair in self._repairs(step, groups[name])]
        built = shared(self._run.ranks, self._replies(repairs), self._build)
        outcomes = {
            (one.wrong.rollout.group, one.wrong.rollout.sample): made if isinstance(made, str) else "kept"
            for one, made in zip(repairs, built, strict=True)
        }
        return [_told(one, eligible, outcomes) for one in originals] + [one for one in built if isinstance(one, Scored)]

    def _eligible(self, group: Sequence[Scored]) -> bool:
        """Neither too easy nor too hard; what could not be scored is neither right nor wrong."""
        right, wrong = sum(one.right for one in group), sum(_wrong(one) for one in group)
        return right >= self._part.least_right and wrong >= self._part.least_wrong

    def _repairs(self, step: int, group: Sequence[Scored]) -> Iterator[_Repair]:
        """Those of an eligible group; none, if all its wrong responses were cut off."""
        right = [one for one in group if one.right]
        rollout = group[0].rollout
        draw = random_source((self._run.seed, "reflect", step, rollout.group, rollout.prompt.id))
        # a cut-off response is wrong for its length, not for an error that could be shown
        whole = [one for one in group if _wrong(one) and one.rollout.stop is Stop.EOS]
        for place in sorted(draw.permutation(len(whole))[: self._part.most_repairs].tolist()):
            one = whole[place].rollout
            yield _Repair(
                wrong=whole[place],
                right=right[int(draw.integers(len(right)))],
                key=(*self.key(step, one.group, one.prompt, one.sample), "reflection"),
            )

    def _replies(self, repairs: Sequence[_Repair]) -> list[tuple[_Repair, Completion | None]]:
        """What the student answers to the synthesis prompts; None to one that has no room for an answer."""
        sampling = self._part.sampling
        requests = [Request(tokens=self._ask(one), sampling=sampling, key=one.key) for one in repairs]
        fits = [len(one.tokens) + sampling.max_new_tokens <= self._room for one in requests]
        replies = iter(complete(self._tools, [one for one, fit in zip(requests, fits, strict=True) if fit]))
        return [(one, next(replies) if fit else None) for one, fit in zip(repairs, fits, strict=True)]

    def _build(self, replies: Sequence[tuple[_Repair, Completion | None]]) -> list[Scored | str]:
        """Check, score; the name of the failed check for what is dropped."""
        tokenizer = self._tools.tokenizer
        found = [
            "no_room"
            if reply is None
            else reconstruct(
                tokenizer,
                tokenizer.decode(reply.tokens, skip_special_tokens=True),
                one.wrong.rollout.tokens,
                self._part.sampling.max_new_tokens,
                self._part.checks,
            )
            for one, reply in replies
        ]
        texts = [
            (one.wrong.rollout.prompt.answer, made.text)
            for (one, _), made in zip(replies, found, strict=True)
            if isinstance(made, Reconstruction)
        ]
        verdicts = iter(self._tools.judge.score(texts))
        return [
            made if isinstance(made, str) else _constructed(one, made, next(verdicts).reward)
            for (one, _), made in zip(replies, found, strict=True)
        ]

    def _ask(self, repair: _Repair) -> tuple[int, ...]:
        """The synthesis prompt's ids: the conversation, its last turn rewritten."""
        *before, last = repair.wrong.rollout.prompt.messages
        texts = {"problem": last["content"], "wrong": repair.wrong.rollout.text, "right": repair.right.rollout.text}
        # in one pass: a response may itself hold the name of a place
        asked = re.sub(r"\{(problem|wrong|right)\}", lambda place: texts[place[1]], self._part.instruction)
        thinking = self._run.prompts.thinking if self._part.thinking is None else self._part.thinking
        return render(self._tools.tokenizer, [*before, {"role": "user", "content": asked}], thinking=thinking)


def _wrong(one: Scored) -> bool:
    return one.reward is not None and not one.right


def _told(one: Scored, eligible: Collection[str], outcomes: Mapping[tuple[str, int], str]) -> Scored:
    """With facts of what became of it: whether its group may be repaired, and how its own repair ended."""
    facts = {"reflect/eligible": float(one.rollout.group in eligible)}
    outcome = outcomes.get((one.rollout.group, one.rollout.sample))
    if outcome is not None:
        facts |= {f"reflect/{name}": float(outcome == name) for name in ("kept", *FAILURES)}
    return replace(one, facts={**one.facts, **facts})


def _constructed(repair: _Repair, made: Reconstruction, reward: float | None) -> Scored:
    wrong = repair.wrong.rollout
    return Scored(
        rollout=Rollout(
            prompt=wrong.prompt,
            group=f"{wrong.group}/ref",
            sample=wrong.sample,
            tokens=made.tokens,
            logprobs=None,
            origin=(Origin.CONSTRUCTED,) * len(made.tokens),
            stop=Stop.EOS,
            version=wrong.version,
            text=made.text,
        ),
        reward=reward,
        facts={"prefix_tokens": float(made.copied), "reflect/copied": made.copied / len(made.tokens)},
    )
