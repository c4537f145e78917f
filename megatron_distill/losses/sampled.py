"""A divergence judged by the sampled token alone: an unbiased gradient from one log-prob of either model.

For D = sum_v l(q_v, p_v) the gradient is that of E_{y~q}[h(y) log q(y)] with h = dl/dq constant, to which any constant
may be added since E[grad log q] = 0. With x = log(p/q) at y:

    reverse KL         h = -x                      log(q/p): the k1 estimate of the divergence
    JSD(beta)          h = -(1-beta) log(m/q)      m = beta p + (1-beta) q; beta = 1 is the reverse KL
    skew forward KL    h = -(1-alpha) p/m          m = alpha p + (1-alpha) q: between -(1-alpha)/alpha and 0
    skew reverse KL    h = log(q/m) - alpha q/m    m = alpha q + (1-alpha) p

The forward KL would have h = -p/q, which has no bound; it is refused, and so is whatever tends to it. All of it holds
only for y ~ q as q is in the loss: the same temperature, no top-p, no top-k.
"""

from __future__ import annotations

from torch import Tensor

from megatron_distill.losses.kinds import Divergence
from megatron_distill.losses.pointwise import log_mixture_over_student
from megatron_distill.losses.policy import policy_gradient


def check_sampled(kind: Divergence) -> None:
    """Raises ValueError unless `sampled_divergence` has an estimate of `kind` whose size does not explode."""
    if kind.name in ("reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"):
        bounded = kind.parameter > 0 or kind.name in ("reverse_kl", "skew_reverse_kl")
        if bounded and (kind.parameter < 1 or kind.name == "jsd"):
            return
    raise ValueError(
        f"{kind.name} of {kind.parameter:g}: has no estimate by the sampled token (the forward KL's is unbounded); "
        "allowed: reverse_kl, jsd of beta above 0, skew_forward_kl of alpha above 0, skew_reverse_kl, alpha below 1"
    )


def sampled_divergence(logp_R: Tensor, teacher_logp_R: Tensor, kind: Divergence) -> Tensor:
    """h(y) per sampled token: [R]; its gradient in `logp_R` is that of h(y) log q(y) with h constant.

    The value is the divergence's one-sample estimate for the reverse KL. For the others it is the student's part only,
    the one that has a gradient: (1-beta) log(q/m) for the JSD.

    Raises:
        ValueError: see `check_sampled`.
    """
    check_sampled(kind)
    return policy_gradient(logp_R, -_slope(teacher_logp_R - logp_R.detach(), kind))


def _slope(ratio_R: Tensor, kind: Divergence) -> Tensor:
    """h, from log(p/q)."""
    weight = kind.parameter
    match kind.name:
        case "jsd" if weight < 1:
            return -(1 - weight) * log_mixture_over_student(ratio_R, weight)
        case "skew_forward_kl":
            return -(1 - weight) * (-log_mixture_over_student(-ratio_R, 1 - weight)).exp()
        case "skew_reverse_kl" if weight > 0:
            over_q_R = log_mixture_over_student(ratio_R, 1 - weight)
            return -over_q_R - weight * (-over_q_R).exp()
    return -ratio_R
