"""Full-vocabulary divergences of a student q from a teacher p, with closed-form gradients in the student's logits.

Every divergence here is a sum over the vocabulary of one entry per id, l(q_v, p_v). With u the student's logits after
temperature and h_v = dl/dq_v, softmax gives d/du_j = q_j (h_j - sum_v q_v h_v): nothing in it but what a forward pass
has summed already, so no backward pass has a collective. (A raw all-reduce inside the autograd graph would give the
right loss and a wrong gradient.) A forward pass has two all-reduces for the Kullback-Leibler divergences and their
mixture, three for the others and for whatever is clipped.

    forward KL       KL(p||q)                              d/du = q - p
    reverse KL       R = KL(q||p)                          d/du = q (log(q/p) - R)
    mixed KL         w KL(p||q) + (1-w) KL(q||p)
    JSD              beta KL(p||m) + (1-beta) KL(q||m)     m = beta p + (1-beta) q
    skew forward KL  KL(p||m)                              m = alpha p + (1-alpha) q
    skew reverse KL  KL(q||m)                              m = alpha q + (1-alpha) p
    total variation  sum_v |q_v - p_v| / 2

The teacher is a constant. Everything stays in log space; nothing is added to a probability to make its log finite.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_distill.losses.kinds import Clip, Divergence, Outside
from megatron_distill.losses.pointwise import ENTRIES, canonical
from megatron_distill.losses.vocab import all_reduce, maxima, shifted_by
from megatron_distill.types import TopK, VocabPartition, VocabShard


def forward_kl(student: VocabShard, teacher: VocabShard, clip: Clip | None = None) -> Tensor:
    """KL(teacher || student) per row in nats: [R]."""
    return _full(student, teacher, Divergence("forward_kl"), clip)


def reverse_kl(student: VocabShard, teacher: VocabShard, clip: Clip | None = None) -> Tensor:
    """KL(student || teacher) per row in nats: [R]."""
    return _full(student, teacher, Divergence("reverse_kl"), clip)


def jsd(student: VocabShard, teacher: VocabShard, beta: float, clip: Clip | None = None) -> Tensor:
    """Generalised Jensen-Shannon divergence per row in nats: [R] (GKD, arXiv 2306.13649).

    `beta` is the weight of the teacher, as in TRL; some other code bases weight the student. By convention beta = 0
    is the forward KL and beta = 1 the reverse KL: those are the limits of JSD/beta and JSD/(1-beta), not of JSD
    itself, so the loss jumps by about 1/beta at the ends. Do not anneal beta into them.

    Raises:
        ValueError: beta is not within [0, 1].
    """
    return _full(student, teacher, Divergence("jsd", beta), clip)


def skew_forward_kl(student: VocabShard, teacher: VocabShard, alpha: float, clip: Clip | None = None) -> Tensor:
    """KL(p || alpha p + (1-alpha) q) per row in nats: [R] (DistiLLM, arXiv 2402.03898). alpha = 0: the forward KL.

    Raises:
        ValueError: alpha is not within [0, 1); at 1 the student has left the formula.
    """
    return _full(student, teacher, Divergence("skew_forward_kl", alpha), clip)


def skew_reverse_kl(student: VocabShard, teacher: VocabShard, alpha: float, clip: Clip | None = None) -> Tensor:
    """KL(q || alpha q + (1-alpha) p) per row in nats: [R] (DistiLLM, arXiv 2402.03898). alpha = 0: the reverse KL.

    Raises:
        ValueError: alpha is not within [0, 1).
    """
    return _full(student, teacher, Divergence("skew_reverse_kl", alpha), clip)


def mixed_kl(student: VocabShard, teacher: VocabShard, forward_weight: float, clip: Clip | None = None) -> Tensor:
    """w KL(p||q) + (1-w) KL(q||p) per row in nats, with w the `forward_weight`: [R]. `clip` bounds the mixed entry.

    Raises:
        ValueError: the weight is not within [0, 1].
    """
    return _full(student, teacher, Divergence("mixed_kl", forward_weight), clip)


def total_variation(student: VocabShard, teacher: VocabShard) -> Tensor:
    """sum_v |q_v - p_v| / 2 per row, between 0 and 1: [R]."""
    return _full(student, teacher, Divergence("total_variation"), None)


def divergence(
    student: VocabShard,
    teacher: VocabShard | TopK,
    kind: Divergence,
    *,
    outside: Outside = "tail",
    clip: Clip | None = None,
) -> Tensor:
    """The divergence that `kind` names, from all that is known of the teacher, per row in nats: [R].

    `outside` says what becomes of ids outside a teacher's top k; a whole distribution has none.
    """
    if isinstance(teacher, TopK):
        from megatron_distill.losses.top_k import top_k_divergence

        return top_k_divergence(student, teacher, kind, outside, clip)
    return _full(student, teacher, kind, clip)


def _full(student: VocabShard, teacher: VocabShard, kind: Divergence, clip: Clip | None) -> Tensor:
    kind, bounds = canonical(kind), None if clip == Clip() else clip
    logits, constants = student.logits_Rv, _constants(student, teacher)
    if bounds is None and kind.name in _CLOSED:
        return _CLOSED[kind.name].apply(logits, *constants)
    return _Pointwise.apply(logits, *constants, kind, bounds)


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


class _Pointwise(Function):
    """Any divergence that is a sum of entries, each between the bounds of a `Clip` or else constant.

    With a_v = 1 where the entry is within the bounds, and s_v + c q_v the slope, the gradient is
    a_j s_j - q_j sum_v a_v s_v + c q_j (a_j - sum_v a_v q_v).
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_Rv: Tensor,
        teacher_Rv: Tensor,
        partition: VocabPartition,
        kind: Divergence,
        clip: Clip | None,
    ) -> Tensor:
        q_max_R, p_max_R = maxima(partition.group, student_Rv, teacher_Rv)
        local = [shifted_by(student_Rv, q_max_R).exp_().sum(-1), shifted_by(teacher_Rv, p_max_R).exp_().sum(-1)]
        q_sum_R, p_sum_R = all_reduce(local, dist.ReduceOp.SUM, partition.group)
        models = (student_Rv, teacher_Rv, q_max_R, q_sum_R, p_max_R, p_sum_R)
        q_Rv, entry_Rv, slope_Rv, active_Rv = _entries(*models, kind, clip)
        sums = [entry_Rv.sum(-1), slope_Rv.sum(-1)]
        if active_Rv is not None:
            sums.append(q_Rv.masked_fill(active_Rv, 0.0).sum(-1))
        value_R, *totals = all_reduce(sums, dist.ReduceOp.SUM, partition.group)
        ctx.kind, ctx.clip = kind, clip
        ctx.save_for_backward(*models, *totals)
        return value_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None, None, None]:
        *models, slope_R = ctx.saved_tensors if ctx.clip is None else ctx.saved_tensors[:-1]
        q_Rv, _, grad_Rv, active_Rv = _entries(*models, ctx.kind, ctx.clip)
        if active_Rv is not None:
            constant = ENTRIES[ctx.kind.name][1](ctx.kind.parameter)
            inactive_R = ctx.saved_tensors[-1]
            slope_R = slope_R - constant * inactive_R
            grad_Rv = grad_Rv.sub_(q_Rv.masked_fill(active_Rv, 0.0), alpha=constant)
        return grad_Rv.sub_(q_Rv.mul_(slope_R[:, None])).mul_(grad_R[:, None]), None, None, None, None


def _entries(
    student_Rv: Tensor,
    teacher_Rv: Tensor,
    q_max_R: Tensor,
    q_sum_R: Tensor,
    p_max_R: Tensor,
    p_sum_R: Tensor,
    kind: Divergence,
    clip: Clip | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, entries within their bounds, slopes (0 where inactive), and which are active: [R, v] each."""
    q_Rv, p_Rv, ratio_Rv = _probabilities(student_Rv, teacher_Rv, q_max_R, q_sum_R, p_max_R, p_sum_R)
    entry_Rv, slope_Rv = ENTRIES[kind.name][0](q_Rv, p_Rv, ratio_Rv, kind.parameter)
    if clip is None:
        return q_Rv, entry_Rv, slope_Rv, None
    clipped_Rv = entry_Rv.clamp(clip.low, clip.high)
    active_Rv = clipped_Rv == entry_Rv
    return q_Rv, clipped_Rv, slope_Rv.masked_fill(~active_Rv, 0.0), active_Rv


def _probabilities(
    student_Rv: Tensor, teacher_Rv: Tensor, q_max_R: Tensor, q_sum_R: Tensor, p_max_R: Tensor, p_sum_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, p and log(p/q), each [R, v]."""
    shifted_q_Rv, shifted_p_Rv = shifted_by(student_Rv, q_max_R), shifted_by(teacher_Rv, p_max_R)
    q_Rv = shifted_q_Rv.exp().div_(q_sum_R[:, None])
    p_Rv = shifted_p_Rv.exp().div_(p_sum_R[:, None])
    ratio_Rv = shifted_p_Rv.sub_(shifted_q_Rv).add_((q_sum_R.log() - p_sum_R.log())[:, None])
    return q_Rv, p_Rv, ratio_Rv


_CLOSED = {"forward_kl": _ForwardKL, "reverse_kl": _ReverseKL}
