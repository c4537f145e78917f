"""Supervised fine-tuning: cross entropy on response tokens, whoever wrote them. No teacher, no reward.

On demonstrations it is ordinary SFT, on a teacher's rollouts sequence-level distillation (Kim and Rush 2016,
arXiv 1606.07947).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives.base import Needs, Objective, Scope, State, mean_plan
from megatron_distill.types import Batch, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """-log q(y), averaged."""

    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Average over all tokens of the step, or over sequences of their mean per token."""

    @property
    def needs(self) -> Needs:
        return Needs()

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        return mean_plan("cross_entropy", batch, self.reduction), state

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        value_R = -logprob(student, rows.target_R)
        return {"cross_entropy": Term(value_R=value_R, weight_R=weights["cross_entropy"])}
