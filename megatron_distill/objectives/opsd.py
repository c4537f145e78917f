"""On-policy self-distillation ("Self-Distilled Reasoner", arXiv 2601.18734): the student learns from what it would have
said, had it been told the answer.

    sum_v clip(l(q_v, p_v)),   q = student(. | x, y_<n),   p = the same network given the solution (. | x, y*, y_<n)

The loss is a divergence whose entries l are bounded one by one before the sum over the vocabulary: by default the
forward KL, l = p log(p/q), of at most 0.05 nats per entry. That is a gate and not a bounded KL: an entry beyond its
bound has no gradient, so the tokens of style on which a teacher that knows the answer disagrees most are left out.

Who the teacher is and what it reads belongs to `teachers`: the loss works with any. With `divergence: sampled_token`
(the paper's equation 9) it is the policy gradient of the reverse KL, as in `opd`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_distill.objectives._compared import AnyDivergence
from megatron_distill.objectives.base import Reduction


@dataclass(frozen=True, kw_only=True)
class OPSD(AnyDivergence):
    """A divergence of student and teacher, its entries clipped, averaged: by default the forward KL."""

    clip_high: float | None = 0.05
    """Most that an id adds to the divergence, in nats; null: no bound. An id beyond it has no gradient of its own."""
    reduction: Reduction = "sequence_mean"
    """Average over sequences of their mean per token (the paper's equation 6), over all tokens of the step (its code),
    or over sequences of their sum."""
