"""What one entry adds to a divergence, and its slope: every divergence here is a sum over entries of some l(q, p).

An entry is an id of the vocabulary or a bucket of ids, q what the student gives it and p what the teacher gives it.
Where q_v comes from logits u by softmax, the gradient of a sum of entries needs only the slopes q dl/dq:

    d/du_j = slope_j - q_j sum_v slope_v

Slopes are given less a multiple c of q. If all entries count and q sums to 1, that multiple has no effect, and where
the models nearly agree it would cost the digits of what is left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_distill.losses.kinds import Divergence

type Entry = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""q, p, log(p/q), parameter -> the entry l, and its slope q dl/dq less c q; elementwise."""


def _forward_entry(q: Tensor, p: Tensor, ratio: Tensor, _: float) -> tuple[Tensor, Tensor]:
    return p * ratio, -p


def _reverse_entry(q: Tensor, p: Tensor, ratio: Tensor, _: float) -> tuple[Tensor, Tensor]:
    entry = -q * ratio
    return entry, entry


def _jsd_entry(q: Tensor, p: Tensor, ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    over_q = log_mixture_over_student(ratio, beta)
    slope = (beta - 1.0) * q * over_q
    return beta * p * (ratio - over_q) + slope, slope


def _skew_forward_entry(q: Tensor, p: Tensor, ratio: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    under_p = ratio - log_mixture_over_student(ratio, alpha)
    return p * under_p, (alpha - 1.0) * q * (under_p.exp() - 1.0)


def _skew_reverse_entry(q: Tensor, p: Tensor, ratio: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    over_q = log_mixture_over_student(ratio, 1.0 - alpha)
    return -q * over_q, -q * (over_q + alpha * ((-over_q).exp() - 1.0))


def _mixed_entry(q: Tensor, p: Tensor, ratio: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    reverse = (weight - 1.0) * q * ratio
    return weight * p * ratio + reverse, reverse - weight * p


def _total_variation_entry(q: Tensor, p: Tensor, ratio: Tensor, _: float) -> tuple[Tensor, Tensor]:
    return 0.5 * (q - p).abs(), 0.5 * q * (q - p).sign()


ENTRIES: dict[str, tuple[Entry, Callable[[float], float]]] = {
    "forward_kl": (_forward_entry, lambda _: 0.0),
    "reverse_kl": (_reverse_entry, lambda _: 1.0),
    "jsd": (_jsd_entry, lambda _: 0.0),
    "skew_forward_kl": (_skew_forward_entry, lambda alpha: alpha - 1.0),
    "skew_reverse_kl": (_skew_reverse_entry, lambda alpha: 1.0 - alpha),
    "mixed_kl": (_mixed_entry, lambda weight: 1.0 - weight),
    "total_variation": (_total_variation_entry, lambda _: 0.0),
}
"""By name: the entry and its slope less c q, and that c by parameter. Of a `canonical` kind only."""


def canonical(kind: Divergence) -> Divergence:
    """The same divergence without a parameter at the end of its range: there it is one of the two KLs.

    jsd: beta = 0 is the forward and beta = 1 the reverse KL by convention; see `divergence.jsd`.

    Raises:
        ValueError: a skew divergence with alpha = 1, where the student has left the formula.
    """
    forward, reverse = Divergence("forward_kl"), Divergence("reverse_kl")
    match kind.name, kind.parameter:
        case ("jsd" | "skew_forward_kl", 0.0) | ("mixed_kl", 1.0):
            return forward
        case ("jsd", 1.0) | ("skew_reverse_kl" | "mixed_kl", 0.0):
            return reverse
        case ("skew_forward_kl" | "skew_reverse_kl", 1.0):
            raise ValueError(f"{kind.name}: alpha=1.0: must be at least 0 and below 1")
    return kind


def log_mixture_over_student(ratio: Tensor, beta: float) -> Tensor:
    """log(m/q) from x = log(p/q): log((1-beta) + beta e^x), where neither p nor q is ever left as a bare probability.

    With w the weight of the smaller of p and q, it is max(x, 0) + log(1 + w (e^-|x| - 1)). That form has no overflow
    for any x, and unlike log(m) - log(q) keeps its digits where p and q are close. (Not log1p and expm1: x is a
    difference of logits and its own rounding is larger than theirs, and vectorised they are 12 times as slow.)
    """
    less = ratio.abs().neg_().exp_().sub_(1.0)
    if beta == 0.5:
        return _log_of_half_more(less).add_(ratio.clamp(min=0.0))
    weighted = torch.where(ratio > 0, (1.0 - beta) * less, beta * less)
    return weighted.add_(1.0).log_().add_(ratio.clamp(min=0.0))


def _log_of_half_more(d: Tensor) -> Tensor:
    """log(1 + d/2) for d from -1 to 0.

    In fp32 as 2 artanh(z) with z = d / (d+4), that is z P(z^2): a third of the logarithm's time, and a small d keeps
    its digits.
    """
    if d.dtype != torch.float32:
        return (d * 0.5).add_(1.0).log_()
    z = d / (d + 4.0)
    square = z * z
    # P interpolates 2 artanh(z) / z at Chebyshev's points of [0, 1/9], to 4e-9. The numbers stand in the code because
    # torch's compiler takes a float from anywhere else for a variable.
    value = square * 0.2815777830891266
    value = value.add_(0.2796515775674672).mul_(square).add_(0.4002459522992297).mul_(square)
    return value.add_(0.6666632164139599).mul_(square).add_(2.0000000076817583).mul_(z)
