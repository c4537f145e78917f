"""Generalised knowledge distillation (Agarwal et al., arXiv 2306.13649): a Jensen-Shannon divergence of every token.

    JSD(beta) = beta KL(p||m) + (1-beta) KL(q||m),   m = beta p + (1-beta) q,   p teacher, q student

The same divergence serves the student's own rollouts and fixed ones, and nothing is differentiated through sampling.
How often a rollout is the student's own (lambda in the paper) is not a matter of the loss: it is the on-policy
fraction of the rollout source. The paper's loss temperature is 1, as is the default here; TRL's `temperature` is
the sampling temperature only. `beta` weights the teacher, as in the paper and in TRL.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_distill.losses.kinds import Divergence
from megatron_distill.objectives._compared import Compared


@dataclass(frozen=True, kw_only=True)
class GKD(Compared):
    """JSD(beta) of student and teacher, averaged."""

    beta: float = 0.5
    """Weight of the teacher, from 0 to 1. Exactly 0 is the forward KL and exactly 1 the reverse KL, unscaled: the
    loss jumps there, see `losses.divergence.jsd`."""
    sampled_token: bool = False
    """Judge by the sampled token alone, in place of `support`: the divergence's exact gradient in expectation, from one
    log-prob per token. It needs beta above 0, and tokens that the student sampled (see `losses.sampled`)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta={self.beta}: must be between 0 (forward KL) and 1 (reverse KL)")
        super().__post_init__()

    @property
    def measure(self) -> Divergence:
        return Divergence("jsd", self.beta)

    @property
    def by_sampled_token(self) -> bool:
        return self.sampled_token
