"""What a teacher reads before the response that it judges: the student's own prompt, or something the student lacks.

A view makes a context; the response follows it, token for token as it was sampled. Whose weights read it is another
matter: any teacher takes any view.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from megatron_distill.data.phrases import Phrases
from megatron_distill.data.templates import render
from megatron_distill.errors import DataError
from megatron_distill.types import Prompt, Scored, Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBLEM = "problem"
ENDED = "ended_before_cut"
"""Fact of a response that was cut to fit a teacher: 1 if the whole of it had ended by itself."""

TEMPLATE = """{problem}

Below is a worked solution of this problem, for your eyes only.
--- solution ---
{solution}
--- end of solution ---

Make sure that you understand why it is right. Then solve the problem in your own words, without mentioning it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Privileged:
    """The problem with more information, such as its solution (OPSD, arXiv 2601.18734; SDFT, arXiv 2601.19897)."""

    template: str = TEMPLATE
    """The last user turn as the teacher reads it: `{problem}` is that of the student (`data.instruction` included),
    `{NAME}` a hint. Other braces stand for themselves."""
    hints: tuple[str, ...] = ("solution",)
    """Hints that the template shows: `solution` is that of `data.solution_key`, others those of `data.hint_keys`."""
    instruction: str | None = None
    """Text added to the template on a line of its own."""
    thinking: bool | None = None
    """Value of `enable_thinking` for the teacher's chat template; null leaves it to the template."""

    def __post_init__(self) -> None:
        if not self.hints:
            raise ValueError("hints=[]: name at least one, or leave the view out")
        for name in (PROBLEM, *self.hints):
            if f"{{{name}}}" not in self.template:
                raise ValueError(f"template: does not show {{{name}}}")

    def context(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's messages with the last turn as the template has it.

        Raises:
            DataError: the prompt lacks a hint.
        """
        missing = [name for name in self.hints if name not in prompt.hints]
        if missing:
            raise DataError(_lacking(missing[0], f"prompt {prompt.id} has"))
        *before, last = prompt.messages
        shown = {PROBLEM: last["content"], **{name: prompt.hints[name] for name in self.hints}}
        # in one pass, so that braces inside a problem or a hint stay what they are
        names = "|".join(re.escape(name) for name in shown)
        text = re.sub(rf"\{{({names})\}}", lambda found: shown[found[1]], self.template)
        if self.instruction is not None:
            text += "\n" + self.instruction
        return render(tokenizer, [*before, {**last, "content": text}], thinking=self.thinking)


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """The response itself, and whether it was right: SD-Zero, phase 2.

    The context is prompt + response + phrase; then comes the response again, which is judged. The end of sequence that
    closes the first copy is left out of it, because the phrase goes on; the second copy keeps its own.
    """

    phrases: Phrases = field(default_factory=Phrases)
    """What stands between the copies, by reward: the words of the revisions that the student was trained on."""

    def context(self, tokenizer: PreTrainedTokenizerBase, one: Scored) -> tuple[int, ...]:
        """Ids as they were sampled, never cut anew.

        Raises:
            DataError: the rollout has no reward.
        """
        rollout = one.rollout
        if one.reward is None:
            raise DataError(
                f"prompt {rollout.prompt.id}: a response without a reward has no phrase; the view `revision` needs "
                "reward.kind=math or exact"
            )
        first = rollout.tokens[:-1] if rollout.stop is Stop.EOS else rollout.tokens
        return (*rollout.prompt.tokens, *first, *self.phrases.tokens(tokenizer, one.reward))


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a teacher reads before the response; by default what the student reads."""

    privileged: Privileged | None = None
    """Show it the problem with more information."""
    revision: Revision | None = None
    """Show it the response and whether it was right, before the same response."""
    max_tokens: int | None = None
    """Longest context and response together; of a longer one the response is cut, for the student as well. null: the
    positions of the teacher's model."""

    def __post_init__(self) -> None:
        if self.privileged is not None and self.revision is not None:
            raise ValueError("privileged and revision: give one of them, not both")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens={self.max_tokens}: must be at least 2")

    @property
    def same(self) -> bool:
        """Whether the teacher reads what the student reads."""
        return self.privileged is None and self.revision is None

    @property
    def hints(self) -> tuple[str, ...]:
        """Hints that every prompt must have."""
        return () if self.privileged is None else self.privileged.hints

    def context(self, tokenizer: PreTrainedTokenizerBase, one: Scored) -> tuple[int, ...]:
        """Ids before the response.

        Raises:
            DataError: a hint or a reward is missing.
        """
        if self.privileged is not None:
            return self.privileged.context(tokenizer, one.rollout.prompt)
        if self.revision is not None:
            return self.revision.context(tokenizer, one)
        return one.rollout.prompt.tokens

    def reading(self, tokenizer: PreTrainedTokenizerBase, one: Scored) -> Scored:
        """The rollout with the context in place of the prompt."""
        prompt = replace(one.rollout.prompt, tokens=self.context(tokenizer, one))
        return replace(one, rollout=replace(one.rollout, prompt=prompt))

    def fit_all(self, tokenizer: PreTrainedTokenizerBase, scored: Sequence[Scored], positions: int) -> list[Scored]:
        """Those of a step that can be read, cut where they must be.

        Raises:
            DataError: none is left, or a revision has no verdict at all.
        """
        fitting = [self.fit(tokenizer, one, positions) for one in scored]
        kept = [one for one in fitting if one is not None]
        if scored and not kept:
            if all(one.reward is None for one in scored):
                self.context(tokenizer, scored[0])  # a revision says what it lacks
            raise DataError(
                f"no response of the step fits behind what a teacher reads first, within {positions} positions or "
                "view.max_tokens: raise the latter, or lower data.max_prompt_tokens"
            )
        return kept

    def fit(self, tokenizer: PreTrainedTokenizerBase, one: Scored, positions: int) -> Scored | None:
        """The rollout, cut to what fits into `max_tokens` or `positions`; None where nothing does, or where a revision
        has no verdict to show, because the verifier could not score it.

        What is cut has no end of sequence, and keeps the reward of the whole and, as a fact, whether that had ended by
        itself: what is missing here says nothing of the student. The revision's response stands there
        twice, so that it is cut to half of the room.
        """
        if self.revision is not None and one.reward is None:
            return None
        limit = positions if self.max_tokens is None else min(self.max_tokens, positions)
        context, length = len(self.context(tokenizer, one)), len(one.rollout.tokens)
        if context + length <= limit:
            return one
        if self.revision is None:
            room = limit - context
        else:
            first = length - (one.rollout.stop is Stop.EOS)
            room = (limit - (context - first)) // 2
        return shortened(one, min(room, length - 1)) if room > 0 and length > 1 else None


def shortened(one: Scored, length: int) -> Scored:
    """The first `length` tokens of a response, without its end; the fact `ENDED` says whether it had one."""
    rollout, versions = one.rollout, one.rollout.versions[:length]
    cut = replace(
        rollout,
        tokens=rollout.tokens[:length],
        logprobs=None if rollout.logprobs is None else rollout.logprobs[:length],
        origin=rollout.origin[:length],
        stop=Stop.LENGTH,
        version=min(versions),
        versions=versions,
    )
    ended = one.facts.get(ENDED, float(rollout.stop is Stop.EOS))  # several teachers may cut, one after the other
    return replace(one, rollout=cut, facts={**one.facts, ENDED: ended})


def check_hints(name: str, view: View, prompts: Sequence[Prompt]) -> None:
    """Before the run starts.

    Raises:
        DataError: prompts lack a hint that the teacher of that name is to be shown.
    """
    for hint in view.hints:
        without = [prompt.id for prompt in prompts if hint not in prompt.hints]
        if without:
            who = f"teachers.{name}.view: {len(without)} of {len(prompts)} prompts, the first is {without[0]}, have"
            raise DataError(_lacking(hint, who))


def _lacking(hint: str, who: str) -> str:
    key = "data.solution_key" if hint == "solution" else f"data.hint_keys.{hint}=COLUMN"
    return f"{who} no {hint!r} to show the teacher: set {key}"
