"""What one rank computes from its own columns of the logits: tensor functions without collectives or autograd.

Every region is `region(logits, rows_nR, *settings)`: raw logits [R, v] of one model or of student and teacher, real
columns only and of any floating type; numbers per row, one kind per line; and plain Python settings. It gives either
several sums per row [R] or the columns of a gradient [R, v]. Types are widened and the temperature is applied here and
nowhere else. Rows do not know of each other, so a backend may take as many at a time as it likes.

s = max(logit / T - m, LOWEST) is a shifted logit. m and Z = sum exp(s) stay apart: exp(s) / Z is several times more
exact in fp32 than exp(logit - logsumexp).

Operations are in place wherever a tensor is a region's own: eagerly that is fewer passes over the cache, and to a
compiler it makes no difference. The first of them, a subtraction, never is: it may read the logits themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_distill.losses.pointwise import ENTRIES, log_mixture_over_student

type Region = Callable[..., Any]

LOWEST = -1e4
"""A logit further than this below its row's maximum, -inf included, counts as this far below it.

exp(-1e4) is 0 in every floating type, so no probability changes. It turns 0 * inf into 0, and what would be an
infinite divergence between models that exclude different ids into a large finite one. How large depends a little on
the cut: such a logit lies this far below the maximum of its rank's columns, which may be some nats below the row's
(1e4 + 5 in place of 1e4, say). Ids that both models exclude, or have, are the same under every cut.
"""


def model_sums(logits: Sequence[Tensor], rows_nR: None, scale: float, with_entropy: bool) -> tuple[Tensor, ...]:
    """m, Z and, if wanted, sum exp(s) s of one model."""
    scaled_Rv = _scaled(logits[0], scale)
    max_R = _maxima(scaled_Rv)
    if not with_entropy:
        return max_R, (scaled_Rv - max_R[:, None]).exp_().sum(-1)
    shifted_Rv = _shifted(scaled_Rv, max_R)
    exp_Rv = shifted_Rv.exp()
    return max_R, exp_Rv.sum(-1), exp_Rv.mul_(shifted_Rv).sum(-1)


def pair_sums(
    logits: Sequence[Tensor], rows_nR: None, student_scale: float, teacher_scale: float, forward: bool, reverse: bool
) -> tuple[Tensor, ...]:
    """m_q, m_p, Z_q, Z_p, and if wanted sum exp(s_p) (s_p - s_q) and sum exp(s_q) (s_q - s_p)."""
    student_Rv, teacher_Rv = _scaled(logits[0], student_scale), _scaled(logits[1], teacher_scale)
    q_max_R, p_max_R = _maxima(student_Rv), _maxima(teacher_Rv)
    if not forward and not reverse:
        q_sum_R = (student_Rv - q_max_R[:, None]).exp_().sum(-1)
        return q_max_R, p_max_R, q_sum_R, (teacher_Rv - p_max_R[:, None]).exp_().sum(-1)
    shifted_q_Rv, shifted_p_Rv = _shifted(student_Rv, q_max_R), _shifted(teacher_Rv, p_max_R)
    exp_q_Rv, exp_p_Rv = shifted_q_Rv.exp(), shifted_p_Rv.exp()
    sums = [q_max_R, p_max_R, exp_q_Rv.sum(-1), exp_p_Rv.sum(-1)]
    ratio_Rv = shifted_p_Rv.sub_(shifted_q_Rv)
    if forward:
        sums.append(exp_p_Rv.mul_(ratio_Rv).sum(-1))
    if reverse:
        sums.append(-exp_q_Rv.mul_(ratio_Rv).sum(-1))
    return tuple(sums)


def entry_sums(
    logits: Sequence[Tensor],
    rows_nR: Tensor,
    student_scale: float,
    teacher_scale: float,
    name: str,
    parameter: float,
    low: float | None,
    high: float | None,
) -> tuple[Tensor, ...]:
    """Of a divergence's entries: their sum, their slopes' sum and, if they are clipped, q's sum over the inactive.

    `rows_nR` are m_q, m_p, 1/Z_q, 1/Z_p and log Z_q - log Z_p.
    """
    q_Rv, entry_Rv, slope_Rv, inactive_Rv = _entries(
        logits, rows_nR, student_scale, teacher_scale, name, parameter, low, high
    )
    sums = [entry_Rv.sum(-1), slope_Rv.sum(-1)]
    if inactive_Rv is not None:
        sums.append(torch.where(inactive_Rv, q_Rv, 0.0).sum(-1))
    return tuple(sums)


def entry_gradient(
    logits: Sequence[Tensor],
    rows_nR: Tensor,
    student_scale: float,
    teacher_scale: float,
    name: str,
    parameter: float,
    low: float | None,
    high: float | None,
) -> Tensor:
    """(slope - q total) factor, with c q less in the slope of entries that are not active.

    `rows_nR` are those of `entry_sums`, then the factor and the total.
    """
    q_Rv, _, slope_Rv, inactive_Rv = _entries(logits, rows_nR, student_scale, teacher_scale, name, parameter, low, high)
    factor_R, total_R = rows_nR[5], rows_nR[6]
    total_Rv: Tensor = total_R[:, None]
    if inactive_Rv is not None:
        total_Rv = torch.where(inactive_Rv, total_Rv + ENTRIES[name][1](parameter), total_Rv)
    return (slope_Rv - q_Rv * total_Rv) * factor_R[:, None]


def kl_gradient(
    logits: Sequence[Tensor],
    rows_nR: Tensor,
    student_scale: float,
    teacher_scale: float,
    forward: bool,
    reverse: bool,
) -> Tensor:
    """exp(s_q) (a + b (s_q - s_p - mean)) - exp(s_p) c: `rows_nR` are m_q, m_p, a, c, b, mean.

    The first part of it is the forward KL's, the second the reverse KL's; log Z of both models has cancelled.
    """
    q_max_R, p_max_R, a_R, c_R, b_R, mean_R = rows_nR.unbind()
    shifted_q_Rv = _scaled(logits[0], student_scale) - q_max_R[:, None]
    shifted_p_Rv = _scaled(logits[1], teacher_scale) - p_max_R[:, None]
    if not reverse:
        # Nothing here is infinite times 0, so there is no need of LOWEST.
        return shifted_q_Rv.exp_().mul_(a_R[:, None]).sub_(shifted_p_Rv.exp_().mul_(c_R[:, None]))
    shifted_q_Rv, shifted_p_Rv = shifted_q_Rv.clamp_(min=LOWEST), shifted_p_Rv.clamp_(min=LOWEST)
    factor_Rv = (shifted_q_Rv - shifted_p_Rv).sub_(mean_R[:, None]).mul_(b_R[:, None])
    if not forward:
        return shifted_q_Rv.exp_().mul_(factor_Rv)
    factor_Rv.add_(a_R[:, None])
    return shifted_q_Rv.exp_().mul_(factor_Rv).sub_(shifted_p_Rv.exp_().mul_(c_R[:, None]))


def jsd_sums(
    logits: Sequence[Tensor], rows_nR: Tensor, student_scale: float, teacher_scale: float, beta: float
) -> tuple[Tensor, ...]:
    """sum exp(s_p) log(p/m) and sum exp(s_q) log(m/q): `rows_nR` are m_q, m_p and log Z_q - log Z_p.

    What `entry_sums` would do, in fewer operations for each column of the divergence that is asked for most.
    """
    shifted_q_Rv, shifted_p_Rv, ratio_Rv = _shifted_pair(logits, rows_nR, rows_nR[2], student_scale, teacher_scale)
    over_q_Rv = log_mixture_over_student(ratio_Rv, beta)
    p_part_R = shifted_p_Rv.exp_().mul_(ratio_Rv.sub_(over_q_Rv)).sum(-1)
    return p_part_R, shifted_q_Rv.exp_().mul_(over_q_Rv).sum(-1)


def jsd_gradient(
    logits: Sequence[Tensor], rows_nR: Tensor, student_scale: float, teacher_scale: float, beta: float
) -> Tensor:
    """exp(s_q) factor (mean - log(m/q)): `rows_nR` are m_q, m_p, log Z_q - log Z_p, the factor and the mean."""
    shifted_q_Rv, _, ratio_Rv = _shifted_pair(logits, rows_nR, rows_nR[2], student_scale, teacher_scale)
    centred_Rv = rows_nR[4][:, None] - log_mixture_over_student(ratio_Rv, beta)
    return shifted_q_Rv.exp_().mul_(centred_Rv.mul_(rows_nR[3][:, None]))


def softmax_gradient(logits: Sequence[Tensor], rows_nR: Tensor, scale: float, with_entropy: bool) -> Tensor:
    """exp(s) (factor + slope s): `rows_nR` are m, the factor and, `with_entropy`, the slope."""
    shifted_Rv = _scaled(logits[0], scale) - rows_nR[0][:, None]
    if not with_entropy:
        return shifted_Rv.exp_().mul_(rows_nR[1][:, None])
    exp_Rv = shifted_Rv.clamp_(min=LOWEST).exp()
    return exp_Rv.mul_(shifted_Rv.mul_(rows_nR[2][:, None]).add_(rows_nR[1][:, None]))


def wide(tensor: Tensor) -> Tensor:
    """In the type of the arithmetic: fp64 stays, anything else becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _scaled(logits_Rv: Tensor, scale: float) -> Tensor:
    return wide(logits_Rv) if scale == 1.0 else wide(logits_Rv) * scale


def _maxima(scaled_Rv: Tensor) -> Tensor:
    """Finite on a rank of nothing but padding too: -inf minus -inf is not a number."""
    lowest = torch.finfo(scaled_Rv.dtype).min
    if scaled_Rv.shape[-1] == 0:
        return scaled_Rv.new_full(scaled_Rv.shape[:1], lowest)
    return scaled_Rv.amax(-1).clamp(min=lowest)


def _shifted(scaled_Rv: Tensor, max_R: Tensor) -> Tensor:
    return (scaled_Rv - max_R[:, None]).clamp_(min=LOWEST)


def _shifted_pair(
    logits: Sequence[Tensor], maxima_nR: Tensor, offset_R: Tensor, student_scale: float, teacher_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """s_q, s_p and log(p/q); m_q and m_p are the first of `maxima_nR`, the offset is log Z_q - log Z_p."""
    shifted_q_Rv = _shifted(_scaled(logits[0], student_scale), maxima_nR[0])
    shifted_p_Rv = _shifted(_scaled(logits[1], teacher_scale), maxima_nR[1])
    return shifted_q_Rv, shifted_p_Rv, (shifted_p_Rv - shifted_q_Rv).add_(offset_R[:, None])


def _entries(
    logits: Sequence[Tensor],
    rows_nR: Tensor,
    student_scale: float,
    teacher_scale: float,
    name: str,
    parameter: float,
    low: float | None,
    high: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, the entries within their bounds, their slopes (0 where inactive), and which are inactive: [R, v] each."""
    shifted_q_Rv, shifted_p_Rv, ratio_Rv = _shifted_pair(logits, rows_nR, rows_nR[4], student_scale, teacher_scale)
    q_Rv, p_Rv = shifted_q_Rv.exp_().mul_(rows_nR[2][:, None]), shifted_p_Rv.exp_().mul_(rows_nR[3][:, None])
    entry_Rv, slope_Rv = ENTRIES[name][0](q_Rv, p_Rv, ratio_Rv, parameter)
    if low is None and high is None:
        return q_Rv, entry_Rv, slope_Rv, None
    clipped_Rv = entry_Rv.clamp(low, high)
    inactive_Rv = clipped_Rv != entry_Rv
    return q_Rv, clipped_Rv, torch.where(inactive_Rv, 0.0, slope_Rv), inactive_Rv
