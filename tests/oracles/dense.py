"""Dense float64 references, written from the mathematics: whole vocabularies, real columns only, plain autograd.

Nothing here may be imported from `megatron_distill.losses`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """A whole training step, uncut: R runs over the response tokens of all sequences, one sequence after another."""

    student_RV: Tensor
    """float64 raw logits; the gradient is asked for."""
    teachers_RV: Mapping[str, Tensor]
    """float64 raw logits by teacher's name."""
    target_R: Tensor
    sequence_R: Tensor
    """Which sequence a token belongs to."""

    def mean(self, value_R: Tensor, reduction: str) -> Tensor:
        """Over tokens, or over sequences of their mean per token."""
        if reduction == "token_mean":
            return value_R.mean()
        sequences = [value_R[self.sequence_R == index].mean() for index in self.sequence_R.unique()]
        return torch.stack(sequences).mean()

    def teacher_average(self, value_R: Mapping[str, Tensor], weights: Mapping[str, float] | None) -> Tensor:
        """Equal shares, or shares in proportion to `weights`."""
        shares = weights or dict.fromkeys(value_R, 1.0)
        total = sum(shares.values())
        return torch.stack([shares[name] / total * value for name, value in value_R.items()]).sum(0)


def log_softmax(logits_RV: Tensor, temperature: float) -> Tensor:
    """log of exp(z/T) over its sum, one row after another."""
    scaled = logits_RV / temperature
    return scaled - scaled.logsumexp(dim=-1, keepdim=True)


def expectation(p_RV: Tensor, value_RV: Tensor) -> Tensor:
    """sum_v p_v value_v, where an id without probability counts nothing even if its value is infinite."""
    return torch.where(p_RV > 0, p_RV * value_RV, 0.0).sum(-1)


def forward_kl(student_RV: Tensor, teacher_RV: Tensor, temperature: float) -> Tensor:
    """sum p (log p - log q)."""
    log_q, log_p = log_softmax(student_RV, temperature), log_softmax(teacher_RV, temperature)
    return expectation(log_p.exp(), log_p - log_q)


def reverse_kl(student_RV: Tensor, teacher_RV: Tensor, temperature: float) -> Tensor:
    """sum q (log q - log p)."""
    log_q, log_p = log_softmax(student_RV, temperature), log_softmax(teacher_RV, temperature)
    return expectation(log_q.exp(), log_q - log_p)


def jsd(student_RV: Tensor, teacher_RV: Tensor, temperature: float, beta: float) -> Tensor:
    """beta sum p log(p/m) + (1-beta) sum q log(q/m); the two KLs at its ends."""
    if beta == 0:
        return forward_kl(student_RV, teacher_RV, temperature)
    if beta == 1:
        return reverse_kl(student_RV, teacher_RV, temperature)
    log_q, log_p = log_softmax(student_RV, temperature), log_softmax(teacher_RV, temperature)
    p, q = log_p.exp(), log_q.exp()
    log_m = (beta * p + (1 - beta) * q).log()
    return beta * expectation(p, log_p - log_m) + (1 - beta) * expectation(q, log_q - log_m)


def entropy(logits_RV: Tensor, temperature: float) -> Tensor:
    """-sum q log q."""
    log_q = log_softmax(logits_RV, temperature)
    return -expectation(log_q.exp(), log_q)


def logprob(logits_RV: Tensor, ids_R: Tensor, temperature: float) -> Tensor:
    """log q(id)."""
    return log_softmax(logits_RV, temperature)[torch.arange(len(ids_R)), ids_R]
