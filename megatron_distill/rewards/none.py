"""No reward: for objectives that learn from a teacher alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatron_distill.rewards.base import Verdict, Verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class NoReward(Verifier):
    """Leaves every response unscored."""

    needs_answers: ClassVar[bool] = False

    def connect(self) -> NoReward:
        """Itself: it holds nothing."""
        return self

    def score(self, pairs: Sequence[tuple[str | None, str]]) -> list[Verdict]:
        """Unscored, all of them."""
        return [Verdict(None) for _ in pairs]

    def close(self) -> None:
        """Nothing to give back."""
