"""DistiLLM (Ko et al., arXiv 2402.03898): a Kullback-Leibler divergence from a mixture, which the other model softens.

    skew forward KL   KL(p || alpha p + (1-alpha) q)     p teacher, q student
    skew reverse KL   KL(q || alpha q + (1-alpha) p)

With alpha above 0 no ratio of probabilities is without bound: the forward one is at most -log(alpha), and its
gradient does not blow up where the student gives the teacher's token almost nothing. The paper's other half, when to
learn from fresh rollouts and when from a buffer of earlier ones (adaptive off-policy), is no part of a loss and is not
here: `rollout.on_policy_fraction` mixes rollouts with the data's solutions at a fixed rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_distill.losses.kinds import Divergence
from megatron_distill.objectives._compared import Compared


@dataclass(frozen=True, kw_only=True)
class DistiLLM(Compared):
    """A skew KL of student and teacher, averaged."""

    divergence: Literal["skew_forward_kl", "skew_reverse_kl"] = "skew_reverse_kl"
    """Which model the expectation is under: the teacher (`skew_forward_kl`) or the student (`skew_reverse_kl`)."""
    alpha: float = 0.1
    """How much of that model is in the mixture it is compared with, at least 0 (the plain KL) and below 1."""
    sampled_token: bool = False
    """Judge by the sampled token alone, in place of `support`: the divergence's exact gradient in expectation, from one
    log-prob per token. It needs tokens that the student sampled (see `losses.sampled`)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha < 1.0:
            raise ValueError(f"alpha={self.alpha}: must be at least 0 (the plain KL) and below 1 (no divergence left)")
        super().__post_init__()

    @property
    def measure(self) -> Divergence:
        return Divergence(self.divergence, self.alpha)

    @property
    def by_sampled_token(self) -> bool:
        return self.sampled_token
