"""What sampled tokens teach: the k1, k2, k3 estimators of a divergence, and policy-gradient surrogates.

How an estimator is used decides what it teaches. For y ~ q, the expected gradient is

    k1 as a detached advantage of `policy_gradient`   the reverse KL's, exactly
    k1 back-propagated                                0
    k2 back-propagated                                the reverse KL's
    k3 back-propagated                                the *forward* KL's

All of it holds only if y was sampled from the very q of the loss: same temperature, no top-p, no top-k.
Source: J. Schulman, "Approximating KL divergence" (2020); checked by enumeration in tests/unit/losses/test_policy.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 20.0
"""Ratios of probabilities stop growing at e^20, where any update is lost anyway: sums stay finite."""


def k1(logp_R: Tensor, teacher_logp_R: Tensor) -> Tensor:
    """log q(y) - log p(y): unbiased for KL(q||p), of high variance, negative half of the time."""
    return logp_R - teacher_logp_R


def k2(logp_R: Tensor, teacher_logp_R: Tensor) -> Tensor:
    """(log q(y) - log p(y))^2 / 2: biased, of low variance."""
    return 0.5 * (logp_R - teacher_logp_R).square()


def k3(logp_R: Tensor, teacher_logp_R: Tensor) -> Tensor:
    """p/q - 1 - log p/q at y: unbiased for KL(q||p) and never negative. A figure to log, not a loss for reverse KL.

    A p/q beyond e^20 counts as e^20.
    """
    ratio_R = (teacher_logp_R - logp_R).clamp(max=LARGEST_LOG_RATIO)
    return ratio_R.expm1() - ratio_R


def policy_gradient(
    logp_R: Tensor,
    advantage_R: Tensor,
    behaviour_logp_R: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    """-(q(y) / mu(y)) A with A and mu constant: its gradient is -(q/mu) A grad log q(y). [R].

    mu is the policy that sampled y; None says that it was q itself, as it stands now: then the ratio is 1, the value
    is -A and the gradient that of -A log q(y). Ratios above `limit` (default: e^20) count as `limit`, in value and
    gradient alike: truncated importance sampling, which unlike a clip keeps the token.
    """
    behaviour = logp_R if behaviour_logp_R is None else behaviour_logp_R
    largest = LARGEST_LOG_RATIO if limit is None else min(math.log(limit), LARGEST_LOG_RATIO)
    behaviour = torch.maximum(behaviour, logp_R - largest)
    return -(logp_R - behaviour.detach()).exp() * advantage_R.detach()


def clipped_surrogate(
    logp_R: Tensor,
    old_logp_R: Tensor,
    advantage_R: Tensor,
    low: float,
    high: float,
    dual: float | None = None,
) -> Tensor:
    """max(-A r, -A clip(r, 1 - low, 1 + high)) with r = exp(log q - log q_old), to be minimised: [R].

    Its gradient is -A r grad log q(y), or 0 where r has already gone beyond the bound that A pushes it to: above
    1 + high where A > 0, below 1 - low where A < 0. Source: PPO (arXiv 1707.06347, equation 7); high > low is DAPO's
    clip-higher (arXiv 2503.14476). For A < 0 a large r is not clipped, and one token may outweigh all others; `dual`
    bounds the value by -A dual there (dual-clip PPO, arXiv 1912.09729, equation 5).
    """
    log_ratio_R = logp_R - old_logp_R.detach()
    largest = LARGEST_LOG_RATIO if dual is None else math.log(dual)
    smallest = math.log1p(-low) if low < 1 else -math.inf
    # Where A > 0 only the upper bound can be the larger of the two, where A < 0 only the lower one.
    raised_R = log_ratio_R.clamp(max=math.log1p(high)).exp()
    lowered_R = log_ratio_R.clamp(min=smallest, max=largest).exp()
    advantage_R = advantage_R.detach()
    return -advantage_R * torch.where(advantage_R >= 0, raised_R, lowered_R)
