"""Trust-region on-policy distillation (Xing et al., arXiv 2606.01249): policy gradient where the teacher is near.

A token that the student sampled is trusted with the probability that speculative decoding would accept it,

    M ~ Bernoulli(min(1, p(y)/q(y))),   p teacher, q student

    trusted      A = log p(y) - log q(y) in policy-gradient form: the sampled reverse KL
    outlier      forward KL over the teacher's top-k: where p is far below q the sampled gradient knows no bound, and
                 says nothing of where the probability should go instead
    teacher's    beta times cross entropy, on the start of a response that the teacher wrote

All three share one denominator, so that a token counts alike whatever it turns out to be. No code is released; what
the paper leaves open, and what was chosen, is in docs/objectives/tropd.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_distill.losses.kinds import Divergence, Outside
from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives._sampled import Weighted, mean_over_tokens
from megatron_distill.objectives.base import Needs, Scope, State, reduction_weights
from megatron_distill.types import (
    Batch,
    Fidelity,
    MicroBatch,
    Origin,
    Plan,
    Responses,
    TeacherSignal,
    Term,
    TokenStats,
    VocabShard,
)


@dataclass(frozen=True, kw_only=True)
class TrOPD(Weighted):
    """Policy gradient on trusted tokens, forward KL on outliers, cross entropy on the teacher's own."""

    support: Literal["full", "top_k"] = "top_k"
    """How much of the teacher an outlier is compared with."""
    outside: Outside = "truncate"
    """The paper's formula leaves out what the teacher did not name; see `Supervised.outside` for the others."""
    outlier: Literal["forward_kl", "mask", "clip"] = "forward_kl"
    """What an outlier teaches: the forward KL, nothing, or the policy gradient with A no lower than `clip_floor`."""
    clip_floor: float = -1.0
    """Of `outlier: clip`, in nats. The paper does not give it; at -1 a trusted token's expected push,
    min(1, r) |log r|, is largest."""
    guidance: float = 0.001
    """beta, the weight of tokens that the teacher wrote."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_floor > 0:
            raise ValueError(f"clip_floor={self.clip_floor}: must be 0 or below, an outlier's advantage is negative")
        if self.outlier != "clip":
            self.refuse_idle(f"outlier={self.outlier}", "clip_floor")
        if self.guidance < 0:
            raise ValueError(f"guidance={self.guidance}: must be 0 or above")

    @property
    def needs(self) -> Needs:
        return Needs(
            teacher=self.fidelity if self.outlier == "forward_kl" else Fidelity.TOKEN,
            student_logprobs="rollout" if self.old_logprobs == "rollout" else "recompute",
            teacher_logprobs=True,
            origins=frozenset({Origin.STUDENT, Origin.TEACHER}),
            unfiltered_samples=True,
            teacher_names=self.named_teachers,
        )

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        self.check_samples(batch)
        assert stats.student_logp is not None
        share, denominator = reduction_weights(batch, scope, self.reduction)
        teacher_logp = self.mean_teacher_logp(stats, batch)
        judged = [
            self._judge_tokens(micro, share_R, p_R - q_R, _draws(micro, scope))
            for micro, share_R, p_R, q_R in zip(batch.micro, share, teacher_logp, stats.student_logp, strict=True)
        ]
        planned = {name: tuple(one[name] for one in judged) for name in judged[0]}
        sampled, probability = planned.pop("sampled"), planned.pop("probability")
        terms = ("trust", "guidance") if self.outlier == "mask" else ("trust", "outlier", "guidance")
        plan = Plan(
            weights={**planned, **self.teacher_plan(batch)},
            denominators=dict.fromkeys(terms, denominator),
            metrics=(
                mean_over_tokens("objective/trusted", tuple(one > 0 for one in planned["trust"]), sampled, scope),
                mean_over_tokens("objective/trust_probability", probability, sampled, scope),
            ),
        )
        return plan, state

    def _judge_tokens(
        self, micro: MicroBatch, share_R: Tensor, advantage_R: Tensor, draws_R: Tensor
    ) -> dict[str, Tensor]:
        """What each token of a micro-batch is, and weighs."""
        sampled_R = micro.origin_R == Origin.STUDENT
        # Where the teacher wrote, the engine may have no log-prob: NaN, which a weight of 0 would not cancel.
        advantage_R = advantage_R.masked_fill(~sampled_R, 0.0)
        probability_R = advantage_R.clamp(max=0.0).exp()
        # Draws are below 1, so that where p >= q a token is trusted for certain.
        trusted_R = draws_R < probability_R
        return {
            "sampled": sampled_R,
            "probability": probability_R,
            "advantage": advantage_R,
            "trust": share_R * (sampled_R & trusted_R),
            "outlier": share_R * (sampled_R & ~trusted_R),
            "guidance": share_R * self.guidance * ~sampled_R,
        }

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        logp_R, advantage_R = logprob(student, rows.target_R), weights["advantage"]
        values = {"trust": self.pull(logp_R, advantage_R, rows), "guidance": -logp_R}
        if self.outlier == "forward_kl":
            kind = Divergence("forward_kl")
            values["outlier"] = self.blend(teachers, weights, lambda signal: self.compare(student, signal, kind))
        elif self.outlier == "clip":
            values["outlier"] = self.pull(logp_R, advantage_R.clamp(min=self.clip_floor), rows)
        return {name: Term(value_R=value_R, weight_R=weights[name]) for name, value_R in values.items()}


def _draws(micro: MicroBatch, scope: Scope) -> Tensor:
    """One uniform number per token, by sequence and place in it: the same however the step is cut."""
    lengths = micro.segment_R.bincount(minlength=len(micro.sequences)).tolist()
    keys = zip(micro.index_S.tolist(), lengths, strict=True)
    drawn = [scope.uniform(length, "trust", index) for index, length in keys]
    return torch.cat([torch.zeros(0), *drawn]).to(micro.target_R.device)
