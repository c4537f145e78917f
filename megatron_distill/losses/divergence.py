"""Full-vocabulary divergences of a student q from a teacher p, with closed-form gradients in the student's logits.

Two all-reduces forward (three for the Jensen-Shannon divergence), none backward. Each is an autograd Function: a raw
all-reduce inside the autograd graph would give the right loss and a wrong gradient. Formulas, with u the student's
logits as they stand in its `VocabShard` (after temperature):

    forward KL   KL(p||q)                             d/du = q - p
    reverse KL   R = KL(q||p)                         d/du = q (log(q/p) - R)
    JSD(beta)    beta KL(p||m) + (1-beta) KL(q||m)    d/du = (1-beta) q (log(q/m) - KL(q||m))
                 with m = beta p + (1-beta) q

The teacher is a constant. Everything stays in log space; nothing is added to a probability to make its log finite.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_distill.losses.vocab import all_reduce, maxima, shifted_by
from megatron_distill.types import VocabPartition, VocabShard


def forward_kl(student: VocabShard, teacher: VocabShard) -> Tensor:
    """KL(teacher || student) per row in nats: [R]."""
    return _ForwardKL.apply(student.logits_Rv, *_constants(student, teacher))


def reverse_kl(student: VocabShard, teacher: VocabShard) -> Tensor:
    """KL(student || teacher) per row in nats: [R]."""
    return _ReverseKL.apply(student.logits_Rv, *_constants(student, teacher))


def jsd(student: VocabShard, teacher: VocabShard, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence per row in nats: [R] (GKD, arXiv 2306.13649).

    `beta` is the weight of the teacher, as in TRL; some other code bases weight the student. By convention beta = 0
    is the forward KL and beta = 1 the reverse KL: those are the limits of JSD/beta and JSD/(1-beta), not of JSD
    itself, so the loss jumps by about 1/beta at the ends. Do not anneal beta into them.

    Raises:
        ValueError: beta is not within [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta}: must be between 0 (forward KL) and 1 (reverse KL)")
    if beta == 0.0:
        return forward_kl(student, teacher)
    if beta == 1.0:
        return reverse_kl(student, teacher)
    return _JSD.apply(student.logits_Rv, *_constants(student, teacher), beta)


def _constants(student: VocabShard, teacher: VocabShard) -> tuple[Tensor, VocabPartition]:
    """The teacher's logits without gradient, in the student's dtype, and the partition that both share.

    Columns that are not the same ids would give a plausible and wrong number, so this is always checked.
    """
    ours, theirs = student.partition, teacher.partition
    assert (ours.start, ours.width, ours.valid) == (theirs.start, theirs.width, theirs.valid), (
        f"student and teacher hold different vocabulary columns: {ours} and {theirs}"
    )
    assert ours.group is theirs.group, "student and teacher shards belong to different process groups"
    assert student.logits_Rv.shape == teacher.logits_Rv.shape, "student and teacher logits are of different rows"
    return teacher.logits_Rv.detach().to(student.logits_Rv.dtype), ours


class _ForwardKL(Function):
    @staticmethod
    def forward(ctx: Any, student_Rv: Tensor, teacher_Rv: Tensor, partition: VocabPartition) -> Tensor:
        q_max_R, p_max_R = maxima(partition.group, student_Rv, teacher_Rv)
        shifted_q_Rv, shifted_p_Rv = shifted_by(student_Rv, q_max_R), shifted_by(teacher_Rv, p_max_R)
        exp_p_Rv = shifted_p_Rv.exp()
        p_local_R = exp_p_Rv.sum(-1)
        ratio_local_R = exp_p_Rv.mul_(shifted_p_Rv.sub_(shifted_q_Rv)).sum(-1)
        q_local_R = shifted_q_Rv.exp_().sum(-1)
        q_sum_R, p_sum_R, ratio_R = all_reduce(
            [q_local_R, p_local_R, ratio_local_R], dist.ReduceOp.SUM, partition.group
        )
        ctx.save_for_backward(student_Rv, teacher_Rv, q_max_R, q_sum_R, p_max_R, p_sum_R)
        return ratio_R / p_sum_R + (q_sum_R.log() - p_sum_R.log())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None]:
        student_Rv, teacher_Rv, q_max_R, q_sum_R, p_max_R, p_sum_R = ctx.saved_tensors
        q_Rv = shifted_by(student_Rv, q_max_R).exp_().div_(q_sum_R[:, None])
        p_Rv = shifted_by(teacher_Rv, p_max_R).exp_().div_(p_sum_R[:, None])
        return q_Rv.sub_(p_Rv).mul_(grad_R[:, None]), None, None


class _ReverseKL(Function):
    @staticmethod
    def forward(ctx: Any, student_Rv: Tensor, teacher_Rv: Tensor, partition: VocabPartition) -> Tensor:
        q_max_R, p_max_R = maxima(partition.group, student_Rv, teacher_Rv)
        shifted_q_Rv, shifted_p_Rv = shifted_by(student_Rv, q_max_R), shifted_by(teacher_Rv, p_max_R)
        exp_q_Rv = shifted_q_Rv.exp()
        q_local_R = exp_q_Rv.sum(-1)
        ratio_local_R = exp_q_Rv.mul_(shifted_q_Rv.sub_(shifted_p_Rv)).sum(-1)
        p_local_R = shifted_p_Rv.exp_().sum(-1)
        q_sum_R, p_sum_R, ratio_R = all_reduce(
            [q_local_R, p_local_R, ratio_local_R], dist.ReduceOp.SUM, partition.group
        )
        mean_R = ratio_R / q_sum_R
        ctx.save_for_backward(student_Rv, teacher_Rv, q_max_R, q_sum_R, p_max_R, mean_R)
        return mean_R + (p_sum_R.log() - q_sum_R.log())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None]:
        student_Rv, teacher_Rv, q_max_R, q_sum_R, p_max_R, mean_R = ctx.saved_tensors
        shifted_q_Rv = shifted_by(student_Rv, q_max_R)
        q_Rv = shifted_q_Rv.exp().mul_((grad_R / q_sum_R)[:, None])
        # log(q/p) - R: the log Z of both models cancels, so it is never added.
        centred_Rv = shifted_q_Rv.sub_(shifted_by(teacher_Rv, p_max_R)).sub_(mean_R[:, None])
        return q_Rv.mul_(centred_Rv), None, None


class _JSD(Function):
    @staticmethod
    def forward(ctx: Any, student_Rv: Tensor, teacher_Rv: Tensor, partition: VocabPartition, beta: float) -> Tensor:
        q_max_R, p_max_R = maxima(partition.group, student_Rv, teacher_Rv)
        local = [shifted_by(student_Rv, q_max_R).exp_().sum(-1), shifted_by(teacher_Rv, p_max_R).exp_().sum(-1)]
        q_sum_R, p_sum_R = all_reduce(local, dist.ReduceOp.SUM, partition.group)
        q_Rv, p_Rv, ratio_Rv = _probabilities(student_Rv, teacher_Rv, q_max_R, q_sum_R, p_max_R, p_sum_R)
        over_q_Rv = _log_mixture_over_student(ratio_Rv, beta)
        q_local_R = -(q_Rv.mul_(over_q_Rv)).sum(-1)
        p_local_R = p_Rv.mul_(ratio_Rv.sub_(over_q_Rv)).sum(-1)
        q_kl_R, p_kl_R = all_reduce([q_local_R, p_local_R], dist.ReduceOp.SUM, partition.group)
        ctx.beta = beta
        ctx.save_for_backward(student_Rv, teacher_Rv, q_max_R, q_sum_R, p_max_R, p_sum_R, q_kl_R)
        return beta * p_kl_R + (1.0 - beta) * q_kl_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None, None]:
        *models, q_kl_R = ctx.saved_tensors
        q_Rv, _, ratio_Rv = _probabilities(*models)
        over_q_Rv = _log_mixture_over_student(ratio_Rv, ctx.beta)
        centred_Rv = over_q_Rv.add_(q_kl_R[:, None]).mul_((ctx.beta - 1.0) * grad_R[:, None])
        return q_Rv.mul_(centred_Rv), None, None, None


def _probabilities(
    student_Rv: Tensor, teacher_Rv: Tensor, q_max_R: Tensor, q_sum_R: Tensor, p_max_R: Tensor, p_sum_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, p and log(p/q), each [R, v]."""
    shifted_q_Rv, shifted_p_Rv = shifted_by(student_Rv, q_max_R), shifted_by(teacher_Rv, p_max_R)
    q_Rv = shifted_q_Rv.exp().div_(q_sum_R[:, None])
    p_Rv = shifted_p_Rv.exp().div_(p_sum_R[:, None])
    ratio_Rv = shifted_p_Rv.sub_(shifted_q_Rv).add_((q_sum_R.log() - p_sum_R.log())[:, None])
    return q_Rv, p_Rv, ratio_Rv


def _log_mixture_over_student(ratio_Rv: Tensor, beta: float) -> Tensor:
    """log(m/q) from x = log(p/q): log((1-beta) + beta e^x), where neither p nor q is ever left as a bare probability.

    With w the weight of the smaller of p and q, it is max(x, 0) + log(1 + w (e^-|x| - 1)). That form has no overflow
    for any x, and unlike log(m) - log(q) keeps its digits where p and q are close.
    """
    smaller_Rv = (ratio_Rv > 0).to(ratio_Rv.dtype).mul_(1.0 - 2.0 * beta).add_(beta)
    return ratio_Rv.abs().neg_().expm1_().mul_(smaller_Rv).log1p_().add_(ratio_Rv.clamp(min=0.0))
