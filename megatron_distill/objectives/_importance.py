"""Truncated importance weights: what an engine sampled with other weights or other arithmetic counts as much as it may.

A step's gradient is meant for tokens drawn from the student q as it stands. They were drawn from mu, the engine: the
same weights in other kernels and number formats, or weights of some updates ago. Every term's weight of a token that
the student sampled is multiplied by the constant

    w = min(q(y) / mu(y), cap)

with q(y) recomputed by the trainer before the backward pass and mu(y) as the engine wrote it down, both at the
temperature of the sampling. Denominators stay as they are, so a step of unusual tokens is not scaled up again. Tokens
that nobody sampled keep weight 1. The ratio is of single tokens, not of all that came before them: biased, of bounded
variance. Nothing is cut off below: where mu gave a token more than q does, it counts less.

Source: truncated importance sampling (Ionides, J. Comput. Graph. Stat. 17(2), 2008); per token between engine and
trainer, as here, F. Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_distill.objectives.base import PerMicro, Scope
from megatron_distill.types import Batch, Metric, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """Section `train.importance`: what becomes of tokens that the engine sampled with other probabilities."""

    weights: Literal["none", "truncated"] = "none"
    """`truncated` multiplies every term's weight of a sampled token by q(y) / mu(y), at most `cap`: the trainer's
    probability of it over the engine's. For stale rollouts, and for engines that compute otherwise than the trainer.
    It may cost a forward pass."""
    cap: float = 2.0
    """Most that a token counts, 1 or more."""

    def __post_init__(self) -> None:
        if not 1 <= self.cap < math.inf:
            raise ValueError(f"cap={self.cap}: must be 1 or more, and finite")


def sampled_tokens(batch: Batch, scope: Scope) -> float:
    """Tokens of the whole step that the student sampled and that carry the engine's log-prob; collective over data."""
    counts = [micro.responses(slice(None)).sampled_R.sum() for micro in batch.micro]
    return float(scope.total(torch.stack(counts).sum().double()))


def importance_weights(batch: Batch, student_logp: PerMicro, cap: float) -> PerMicro:
    """w of every response token: [R] per micro-batch.

    Args:
        batch: with the engine's log-probs.
        student_logp: the trainer's, recomputed at the same temperature.
        cap: most that a token counts.
    """
    return tuple(
        _weights(micro.responses(slice(None)).sampled_R, micro.rollout_logp_R, logp_R, cap)
        for micro, logp_R in zip(batch.micro, student_logp, strict=True)
    )


def _weights(sampled_R: Tensor, engine_R: Tensor, student_R: Tensor, cap: float) -> Tensor:
    log_ratio_R = (student_R - engine_R.to(student_R.dtype)).masked_fill(~sampled_R, 0.0)
    # cut off before the exponential, which might overflow
    return log_ratio_R.clamp(max=math.log(cap)).exp().detach()


def weighted(plan: Plan, batch: Batch, student_logp: PerMicro, cap: float, scope: Scope) -> Plan:
    """The plan with every term's weights multiplied by the importance weights; collective over data.

    What else is planned per token (advantages, earlier log-probs) stays, and so do denominators.
    """
    weights = importance_weights(batch, student_logp, cap)
    terms = {
        name: tuple(one_R * weight_R.to(one_R.dtype) for one_R, weight_R in zip(planned, weights, strict=True))
        for name, planned in plan.weights.items()
        if name in plan.denominators
    }
    assert terms.keys() == plan.denominators.keys(), "a term whose weights are not planned under its own name"
    return replace(
        plan, weights={**plan.weights, **terms}, metrics=(*plan.metrics, *_metrics(batch, weights, cap, scope))
    )


def _metrics(batch: Batch, weights: PerMicro, cap: float, scope: Scope) -> tuple[Metric, ...]:
    sums = []
    for micro, weight_R in zip(batch.micro, weights, strict=True):
        sampled_R = micro.responses(slice(None)).sampled_R
        own = weight_R[sampled_R].double()
        sums.append(
            torch.stack([own.sum(), own.square().sum(), (own >= cap * (1 - 1e-6)).double().sum(), sampled_R.sum()])
        )
    total, squares, capped, count = scope.total(torch.stack(sums).sum(0)).tolist()
    return (
        Metric("importance/weight_mean", total, count),
        Metric("importance/capped", capped, count),
        Metric("importance/effective_share", total * total / squares if squares else 0.0, count),
    )
