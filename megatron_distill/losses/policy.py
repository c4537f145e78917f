"""What sampled tokens say about a divergence: the k1, k2, k3 estimators and the policy-gradient surrogate.

How an estimator is used decides what it teaches. For y ~ q, the expected gradient is

    k1 as a detached advantage of `policy_gradient`   the reverse KL's, exactly
    k1 back-propagated                                0
    k2 back-propagated                                the reverse KL's
    k3 back-propagated                                the *forward* KL's

All of it holds only if y was sampled from the very q of the loss: same temperature, no top-p, no top-k.
Source: J. Schulman, "Approximating KL divergence" (2020); checked by enumeration in tests/unit/losses/test_policy.py.
"""

from __future__ import annotations

from torch import Tensor


def k1(logp_R: Tensor, teacher_logp_R: Tensor) -> Tensor:
    """log q(y) - log p(y): unbiased for KL(q||p), of high variance, negative half of the time."""
    return logp_R - teacher_logp_R


def k2(logp_R: Tensor, teacher_logp_R: Tensor) -> Tensor:
    """(log q(y) - log p(y))^2 / 2: biased, of low variance."""
    return 0.5 * (logp_R - teacher_logp_R).square()


def k3(logp_R: Tensor, teacher_logp_R: Tensor) -> Tensor:
    """p/q - 1 - log p/q at y: unbiased for KL(q||p) and never negative. A figure to log, not a loss for reverse KL."""
    ratio_R = teacher_logp_R - logp_R
    return ratio_R.expm1() - ratio_R


def policy_gradient(logp_R: Tensor, advantage_R: Tensor, behaviour_logp_R: Tensor | None = None) -> Tensor:
    """-(q(y) / mu(y)) A with A and mu constant: its gradient is -(q/mu) A grad log q(y). [R].

    mu is the policy that sampled y; None says that it was q itself, as it stands now: then the ratio is 1, the value
    is -A and the gradient that of -A log q(y).
    """
    behaviour = logp_R if behaviour_logp_R is None else behaviour_logp_R
    return -(logp_R - behaviour.detach()).exp() * advantage_R.detach()
