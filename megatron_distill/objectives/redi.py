"""REDI, reinforcement distillation (arXiv 2505.24850, equation 5): learn from a teacher's wrong traces as well.

    L = mean over pairs [ -log q(y_w)/|y_w| + alpha log q(y_l)/|y_l| ],   y_w a correct trace, y_l a wrong one

`alpha: 0` is length-normalised SFT on the correct traces, `alpha: 1` the symmetric loss (equation 4), to which SimPO
tends for a small beta. No reference model. The loss is linear in log-probs, so it needs no forward pass of its own,
and unbounded below: the push on a wrong token does not fade as its probability does. Paper and released code agree;
the code's optional weighting of the rejected term has a gradient through the weight, which may change the term's sign;
here the weight is a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives._pairs import after_common_prefix, describe_pairs
from megatron_distill.objectives.base import (
    Needs,
    Objective,
    Scope,
    State,
    pair_signs,
    reduction_weights,
    sequence_sums,
)
from megatron_distill.types import Batch, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard


@dataclass(frozen=True, kw_only=True)
class REDI(Objective):
    """Mean log-prob per token of chosen responses up, of rejected ones down by `alpha` as much."""

    alpha: float = 0.8
    """Weight of the rejected response, from 0 to 1; the authors fix 0.8 and tune the learning rate."""
    mask_common_prefix: bool = False
    """Leave out the tokens with which both responses of a pair begin, and count lengths without them. A shared token
    is otherwise pushed by 1/|y_w| - alpha/|y_l|, which is downwards where the rejected response is the much shorter."""
    rejected_decay: float = 0.0
    """Gamma: the rejected term is weighted by exp(gamma n_l), n_l its mean log-prob before the update, so that what is
    unlikely already is pushed less. 0, as in the paper: not weighted."""
    monitor: bool = False
    """Log mean log-probs and accuracy before the update; one more forward pass, free with `rejected_decay`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha}: must be from 0 (chosen responses only) to 1 (symmetric)")
        if not self.rejected_decay >= 0.0:
            raise ValueError(f"rejected_decay={self.rejected_decay}: must be 0 (off) or more")

    @property
    def needs(self) -> Needs:
        scored = self.monitor or self.rejected_decay > 0
        return Needs(pairs=True, student_logprobs="recompute" if scored else "none")

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        signs = pair_signs(batch, scope)
        mask = after_common_prefix(batch, scope) if self.mask_common_prefix else None
        # 1 / (surviving tokens of the whole sequence): a mean per sequence, to be summed over pairs
        means, _ = reduction_weights(batch, scope, "sequence_mean", mask)
        chosen, rejected, scores = [], [], []
        for index, (micro, mean_R, sign_S) in enumerate(zip(batch.micro, means, signs, strict=True)):
            factor_S = torch.full_like(sign_S, self.alpha, dtype=mean_R.dtype)
            if stats.student_logp is not None:
                mean_S = sequence_sums(micro, mean_R.double() * stats.student_logp[index])
                factor_S = factor_S * (self.rejected_decay * mean_S).exp().to(factor_S)
                scores.append(mean_S)
            chosen.append(mean_R * (sign_S > 0)[micro.segment_R])
            rejected.append(mean_R * (factor_S * (sign_S < 0))[micro.segment_R])
        metrics = describe_pairs(batch, scope, tuple(scores), signs) if scores else ()
        pairs = float(batch.counts.groups)
        return Plan(
            weights={"chosen": tuple(chosen), "rejected": tuple(rejected)},
            denominators={"chosen": pairs, "rejected": pairs},
            metrics=metrics,
        ), state

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        logp_R = logprob(student, rows.target_R)
        return {
            "chosen": Term(value_R=-logp_R, weight_R=weights["chosen"]),
            "rejected": Term(value_R=logp_R, weight_R=weights["rejected"]),
        }
