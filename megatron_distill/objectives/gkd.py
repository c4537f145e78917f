"""Generalised knowledge distillation (Agarwal et al., arXiv 2306.13649): a Jensen-Shannon divergence of every token.

    JSD(beta) = beta KL(p||m) + (1-beta) KL(q||m),   m = beta p + (1-beta) q,   p teacher, q student

The same divergence serves the student's own rollouts and fixed ones, and nothing is differentiated through sampling.
How often a rollout is the student's own (lambda in the paper) is not a matter of the loss: it is the on-policy
fraction of the rollout source. The paper's loss temperature is 1, as is the default here; TRL's `temperature` is
the sampling temperature only. `beta` weights the teacher, as in the paper and in TRL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatron_distill.losses.divergence import jsd
from megatron_distill.losses.signal import teacher_shard
from megatron_distill.objectives.base import (
    Needs,
    Objective,
    Scope,
    State,
    check_teacher_weights,
    mean_plan,
    teacher_shares,
)
from megatron_distill.types import Batch, Fidelity, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard


@dataclass(frozen=True, kw_only=True)
class GKD(Objective):
    """JSD(beta) of student and teacher over the whole vocabulary, averaged."""

    beta: float = 0.5
    """Weight of the teacher, from 0 to 1. Exactly 0 is the forward KL and exactly 1 the reverse KL, unscaled: the
    loss jumps there, see `losses.divergence.jsd`."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Average over all tokens of the step, or over sequences of their mean per token."""
    teacher_weights: Mapping[str, float] = field(default_factory=dict)
    """By teacher's name; empty: several teachers count equally."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta={self.beta}: must be between 0 (forward KL) and 1 (reverse KL)")
        check_teacher_weights(self.teacher_weights)

    @property
    def needs(self) -> Needs:
        return Needs(teacher=Fidelity.FULL)

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        return mean_plan("jsd", batch, self.reduction), state

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        shares = teacher_shares(teachers, self.teacher_weights)
        values = [
            share * jsd(student, teacher_shard(teachers[name], self.temperature), self.beta)
            for name, share in shares.items()
        ]
        return {"jsd": Term(value_R=torch.stack(values).sum(0), weight_R=weights["jsd"])}
