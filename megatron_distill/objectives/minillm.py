"""MiniLLM (Gu et al., arXiv 2306.08543): the reverse KL of whole responses, by a policy gradient with a long view.

With r_n = log p(y_n) - log q(y_n), the gradient of KL(q||p) over responses falls into two parts (equation 3):

    single step   the exact reverse KL of the next token, over the vocabulary
    long term     -A_n grad log q(y_n), A_n what r brings after n: how today's token leads to tomorrow's contexts

A_n is divided by the number of tokens it sums over, so that long responses do not win by length, whitened over the
step, and enters a clipped policy gradient. Left out of the paper's method: the language-model loss on pre-training
text, and sampling from a mixture with the teacher, with its importance weights (docs/objectives/minillm.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_distill.losses.kinds import Divergence
from megatron_distill.losses.policy import clipped_surrogate
from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives._sampled import Sampled
from megatron_distill.objectives.base import Needs, PerMicro, Scope, State, reduction_weights
from megatron_distill.types import Batch, Fidelity, Origin, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard

LEAST_SPREAD = 1e-4
"""Whitening divides by no less, in nats: a student that equals its teacher would else learn from rounding errors."""


@dataclass(frozen=True, kw_only=True)
class MiniLLM(Sampled):
    """Policy gradient of later rewards, plus the exact reverse KL of each token."""

    discount: float = 1.0
    """gamma: what a reward counts one token earlier."""
    own_reward: bool = False
    """Whether A_n includes r_n. The single-step part has its expectation already; the released code counts it twice."""
    length_normalise: bool = True
    """Divide A_n by the number of tokens that it sums over."""
    whiten: bool = True
    """Give A mean 0 and variance 1 over all tokens of the step."""
    reward_scale: float = 1.0
    """Multiplies r; felt only without whitening, or by `reward_limit`."""
    reward_limit: float | None = None
    """r, scaled, is clipped to -/+ this; null: not at all."""
    clip_ratio: float = 0.2
    """The importance ratio is clipped to 1 -/+ this; it matters with `old_logprobs: rollout` only."""
    single_step: bool = True
    """Whether to add the exact reverse KL; without it a teacher need give but log-probs. Set `own_reward` then: else a
    token learns from later rewards only, and nothing from its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.single_step:
            self.refuse_support("single_step=false")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount={self.discount}: must be between 0 and 1")
        if not 0 < self.clip_ratio < 1:
            raise ValueError(f"clip_ratio={self.clip_ratio}: must be between 0 and 1")
        for name in ("reward_scale", "reward_limit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be above 0")

    @property
    def needs(self) -> Needs:
        return Needs(
            teacher=self.fidelity if self.single_step else Fidelity.TOKEN,
            student_logprobs="rollout" if self.old_logprobs == "rollout" else "recompute",
            teacher_logprobs=True,
            origins=frozenset({Origin.STUDENT}),
            unfiltered_samples=True,
            teacher_names=self.named_teachers,
        )

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        self.check_samples(batch)
        assert stats.student_logp is not None
        teacher_logp = self.mean_teacher_logp(stats, batch)
        advantages = tuple(
            self._long_term((p_R - q_R).double(), micro.segment_R)
            for p_R, q_R, micro in zip(teacher_logp, stats.student_logp, batch.micro, strict=True)
        )
        if self.whiten:
            advantages = _whitened(advantages, batch.counts.tokens, scope)
        share, denominator = reduction_weights(batch, scope, self.reduction)
        terms = ("long_term", "single_step") if self.single_step else ("long_term",)
        plan = Plan(
            weights={
                **dict.fromkeys(terms, share),
                "advantage": tuple(one_R.to(share[0].dtype) for one_R in advantages),
                **self.teacher_plan(batch),
            },
            denominators=dict.fromkeys(terms, denominator),
        )
        return plan, state

    def _long_term(self, reward_R: Tensor, segment_R: Tensor) -> Tensor:
        reward_R = self.reward_scale * reward_R
        if self.reward_limit is not None:
            reward_R = reward_R.clamp(-self.reward_limit, self.reward_limit)
        sum_R = suffix_sums(reward_R, segment_R, self.discount)
        count_R = suffix_sums(torch.ones_like(reward_R), segment_R)
        if not self.own_reward:
            sum_R, count_R = sum_R - reward_R, count_R - 1.0
        return sum_R / count_R.clamp(min=1.0) if self.length_normalise else sum_R

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        logp_R = logprob(student, rows.target_R)
        old_logp_R = self.old_logp(logp_R, rows)
        values = {
            "long_term": clipped_surrogate(logp_R, old_logp_R, weights["advantage"], self.clip_ratio, self.clip_ratio)
        }
        if self.single_step:
            kind = Divergence("reverse_kl")
            values["single_step"] = self.blend(teachers, weights, lambda signal: self.compare(student, signal, kind))
        return {name: Term(value_R=value_R, weight_R=weights[name]) for name, value_R in values.items()}


def suffix_sums(value_R: Tensor, segment_R: Tensor, discount: float = 1.0) -> Tensor:
    """Over each token and those after it in its sequence, of discount^distance times their value: [R].

    By doubling: after k rounds every sum reaches over 2^k tokens. No power of the discount is divided by, as it would
    be with cumulative sums, so that a long sequence cannot overflow.
    """
    sum_R, reach = value_R, 1
    while reach < len(value_R):
        same_R = segment_R[reach:] == segment_R[:-reach]
        further_R = (discount**reach * sum_R[reach:]).masked_fill(~same_R, 0.0)
        sum_R = torch.cat([sum_R[:-reach] + further_R, sum_R[-reach:]])
        reach *= 2
    return sum_R


def _whitened(values: PerMicro, tokens: int, scope: Scope) -> PerMicro:
    """Mean 0 and variance 1 over the step's tokens; collective."""
    mean = scope.total(torch.stack([value_R.sum() for value_R in values]).sum()) / tokens
    variance = scope.total(torch.stack([(value_R - mean).square().sum() for value_R in values]).sum()) / tokens
    spread = variance.sqrt().clamp(min=LEAST_SPREAD)
    return tuple((value_R - mean) / spread for value_R in values)
