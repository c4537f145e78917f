"""On-policy distillation: the reverse KL of student from teacher, on what the student itself wrote.

Thinking Machines, "On-Policy Distillation" (2025): the advantage of a token is A = log p(y) - log q(y), p the teacher
and q the student, and the student follows the policy gradient of it. That gradient is, in expectation, the reverse
KL's per token (back-propagating the estimator itself would give zero). `divergence: reverse_kl` takes the exact
expectation over the vocabulary instead: no sampling noise, but the teacher's whole distribution.

Unlike the published recipe, A uses the student's current log-probs, not the sampler's, so it has no importance ratio;
the two agree when the sampler holds the current weights. There is no reward and no discounting of later tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatron_distill.losses.divergence import reverse_kl
from megatron_distill.losses.policy import k1, policy_gradient
from megatron_distill.losses.signal import teacher_logprob, teacher_shard
from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives.base import (
    Needs,
    Objective,
    Scope,
    State,
    check_teacher_weights,
    mean_plan,
    teacher_shares,
)
from megatron_distill.types import Batch, Fidelity, Origin, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard


@dataclass(frozen=True, kw_only=True)
class OPD(Objective):
    """KL(student || teacher) per token, by the sampled token's policy gradient or over the whole vocabulary."""

    divergence: Literal["sampled_token", "reverse_kl"] = "sampled_token"
    """`sampled_token` needs one log-prob per token from the teacher and tokens that the student sampled;
    `reverse_kl` needs the teacher's full distribution and takes any tokens."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Average over all tokens of the step, or over sequences of their mean per token."""
    teacher_weights: Mapping[str, float] = field(default_factory=dict)
    """By teacher's name; empty: several teachers count equally."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_teacher_weights(self.teacher_weights)

    @property
    def needs(self) -> Needs:
        if self.divergence == "sampled_token":
            return Needs(teacher=Fidelity.TOKEN, origins=frozenset({Origin.STUDENT}), unfiltered_samples=True)
        return Needs(teacher=Fidelity.FULL)

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        self.check_origins(batch)
        return mean_plan("reverse_kl", batch, self.reduction), state

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        shares = teacher_shares(teachers, self.teacher_weights)
        if self.divergence == "sampled_token":
            # The value is the k1 estimate of the divergence; the gradient is that of -A log q(y).
            logp_R = logprob(student, rows.target_R)
            advantages = [
                -share * k1(logp_R.detach(), teacher_logprob(teachers[name], rows.target_R, self.temperature))
                for name, share in shares.items()
            ]
            value_R = policy_gradient(logp_R, torch.stack(advantages).sum(0))
        else:
            divergences = [
                share * reverse_kl(student, teacher_shard(teachers[name], self.temperature))
                for name, share in shares.items()
            ]
            value_R = torch.stack(divergences).sum(0)
        return {"reverse_kl": Term(value_R=value_R, weight_R=weights["reverse_kl"])}
