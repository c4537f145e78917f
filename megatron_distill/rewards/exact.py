"""Exact match: the final answer, put in a normal form, must be the gold answer in its normal form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_distill.rewards._answers import final_answer
from megatron_distill.rewards.base import Verdict, Verifier

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(\D|$))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact(Verifier):
    """1 when the final answer equals the gold answer, 0 when it does not or is missing.

    Spaces, letter case, `$`, thousands commas and a final full stop do not count, and equal numbers are equal
    (`72.0` and `72`); nothing is calculated.
    """

    answer_after: str | None = "####"
    """The answer is the rest of the line after the last such marker; null when there is no marker."""
    boxed: bool = True
    """Or what stands in a later `\\boxed{}`."""

    def connect(self) -> Exact:
        """Itself: it holds nothing."""
        return self

    def score(self, pairs: Sequence[tuple[str | None, str]]) -> list[Verdict]:
        """Verdicts in order; a pair without gold answer is unscored."""
        return [self._judge(gold, text) for gold, text in pairs]

    def _judge(self, gold: str | None, text: str) -> Verdict:
        if gold is None:
            return Verdict(None)
        answer = final_answer(text, self.answer_after, self.boxed)
        right = answer is not None and normal_form(answer) == normal_form(gold)
        return Verdict(float(right), {"reward/answered": float(answer is not None)})

    def close(self) -> None:
        """Nothing to give back."""


def normal_form(answer: str) -> str | Fraction:
    """A number where the text is one, else the text without what does not count."""
    text = re.sub(r"[\s$]|\\[,;! ]", "", answer).rstrip(".").lower()
    text = THOUSANDS.sub("", text)
    return Fraction(text) if NUMBER.fullmatch(text) and len(text) < 400 else text
