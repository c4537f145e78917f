"""Entropy-aware on-policy distillation (arXiv 2603.07079): forward KL in addition, where the teacher is undecided.

    every token             A = log p(y) - log q_old(y), by a clipped policy gradient: the sampled reverse KL
    those with H(p) >= tau  alpha times sum over the teacher's top-k of p (log p - log q), besides

The reverse KL seeks one mode, and where the teacher sees several good ways on it loses the others; the forward KL
keeps them. It is added, never switched to: tau = infinity is on-policy distillation. Both parts are means over all
tokens, so that a step with few undecided ones has little of the second part. H is the entropy over the whole
vocabulary in nats, or a lower bound of it for teachers that name their top-k only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_distill.losses.kinds import Divergence, Outside
from megatron_distill.losses.policy import clipped_surrogate, k1
from megatron_distill.losses.signal import teacher_entropy, teacher_logprob, teacher_top_k
from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives._sampled import Sampled
from megatron_distill.objectives.base import Needs, Scope, State, reduction_weights
from megatron_distill.types import Batch, Fidelity, Origin, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard


@dataclass(frozen=True, kw_only=True)
class EOPD(Sampled):
    """Sampled reverse KL everywhere, plus forward KL where the teacher's entropy is high."""

    support: Literal["full", "top_k"] = "top_k"
    top_k: int = 16
    outside: Outside = "truncate"
    alpha: float = 1.0
    """Weight of the forward KL."""
    entropy_threshold: float = 0.8
    """tau, in nats: the least entropy of the teacher at which the forward KL is added; infinity: nowhere."""
    entropy_of: Literal["full", "top_k"] = "full"
    """`top_k`: of the teacher's top-k and, as one more id, of all others together. Less than the full entropy, but all
    that a teacher can say which names its likeliest ids only."""
    clip_ratio: float = 0.2
    """The importance ratio is clipped to 1 -/+ this; it matters with `old_logprobs: rollout` only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"alpha={self.alpha}: must be 0 or above")
        if not self.entropy_threshold >= 0:
            raise ValueError(f"entropy_threshold={self.entropy_threshold}: must be 0 or above, .inf for never")
        if not 0 < self.clip_ratio < 1:
            raise ValueError(f"clip_ratio={self.clip_ratio}: must be between 0 and 1")

    @property
    def needs(self) -> Needs:
        return Needs(
            teacher=Fidelity.FULL if self.entropy_of == "full" else self.fidelity,
            student_logprobs="rollout" if self.old_logprobs == "rollout" else "none",
            origins=frozenset({Origin.STUDENT}),
            unfiltered_samples=True,
            teacher_names=self.named_teachers,
        )

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        self.check_samples(batch)
        share, denominator = reduction_weights(batch, scope, self.reduction)
        terms = {"reverse_kl": share, "forward_kl": tuple(self.alpha * share_R for share_R in share)}
        plan = Plan(
            weights={**terms, **self.teacher_plan(batch)},
            denominators=dict.fromkeys(terms, denominator),
        )
        return plan, state

    def _entropy(self, signal: TeacherSignal) -> Tensor:
        if self.entropy_of == "full":
            return teacher_entropy(signal, self.temperature)
        p_RK = teacher_top_k(signal, self.top_k, self.temperature).top_logp_RK.exp()
        others_R = (1.0 - p_RK.sum(-1)).clamp(min=0.0)
        return torch.special.entr(p_RK).sum(-1) + torch.special.entr(others_R)

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        def undecided_forward_kl(signal: TeacherSignal) -> Tensor:
            decided_R = self._entropy(signal) < self.entropy_threshold
            return self.compare(student, signal, Divergence("forward_kl")).masked_fill(decided_R, 0.0)

        logp_R = logprob(student, rows.target_R)
        old_logp_R = self.old_logp(logp_R, rows)
        teacher_logp_R = self.blend(
            teachers, weights, lambda signal: teacher_logprob(signal, rows.target_R, self.temperature)
        )
        advantage_R = -k1(old_logp_R, teacher_logp_R)
        values = {
            "reverse_kl": clipped_surrogate(logp_R, old_logp_R, advantage_R, self.clip_ratio, self.clip_ratio),
            "forward_kl": self.blend(teachers, weights, undecided_forward_kl),
        }
        return {name: Term(value_R=value_R, weight_R=weights[name]) for name, value_R in values.items()}
