"""Supervised fine-tuning: cross entropy on response tokens, whoever wrote them. No teacher, no reward.

On demonstrations it is ordinary SFT, on a teacher's rollouts sequence-level distillation (Kim and Rush 2016,
arXiv 1606.07947). With `keep: correct`, on the student's own samples, it is rejection fine-tuning (RFT; Yuan et al.,
arXiv 2308.01825): whatever the verifier did not find right is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives.base import (
    Needs,
    Objective,
    Reduction,
    Scope,
    State,
    group_sums,
    reduction_weights,
)
from megatron_distill.types import Batch, Metric, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard

CORRECT = 0.5
"""Rewards above it say that a response is right."""


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """-log q(y), averaged."""

    reduction: Reduction = "token_mean"
    """Average over all tokens of the step, over sequences of their mean per token, or over sequences of their sum."""
    keep: Literal["all", "correct"] = "all"
    """Learn from every response, or only from those with a reward above 0.5; the others count nowhere."""

    @property
    def needs(self) -> Needs:
        return Needs(reward=self.keep == "correct")

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        mask: tuple[Tensor, ...] | None = None
        metrics: tuple[Metric, ...] = ()
        if self.keep == "correct":
            # a reward that is not there is NaN, and not above anything
            right = tuple(micro.reward_S > CORRECT for micro in batch.micro)
            mask = tuple(right_S[micro.segment_R] for right_S, micro in zip(right, batch.micro, strict=True))
            kept = float(group_sums(batch, scope, right).sum())
            metrics = (Metric("objective/kept", kept, batch.counts.sequences),)
        weights, denominator = reduction_weights(batch, scope, self.reduction, mask)
        return Plan(
            weights={"cross_entropy": weights}, denominators={"cross_entropy": denominator}, metrics=metrics
        ), state

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        value_R = -logprob(student, rows.target_R)
        return {"cross_entropy": Term(value_R=value_R, weight_R=weights["cross_entropy"])}
