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

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_distill.losses import backend, regions
from megatron_distill.losses.kinds import Clip, Divergence, Outside
from megatron_distill.losses.pointwise import ENTRIES, canonical
from megatron_distill.losses.top_k import top_k_divergence
from megatron_distill.losses.vocab import Reading, below, reduce_in_place
from megatron_distill.types import TopK, VocabShard


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
        return top_k_divergence(student, teacher, kind, outside, clip)
    return _full(student, teacher, kind, clip)


def _full(student: VocabShard, teacher: VocabShard, kind: Divergence, clip: Clip | None) -> Tensor:
    _check_same_columns(student, teacher)
    kind, bounds = canonical(kind), clip or Clip()
    with torch.no_grad():
        constants = Reading.of(teacher)
    return _Divergence.apply(student.logits_Rv, teacher.logits_Rv, Reading.of(student), constants, kind, bounds)


def _check_same_columns(student: VocabShard, teacher: VocabShard) -> None:
    """Columns that are not the same ids would give a plausible and wrong number, so this is always checked."""
    ours, theirs = student.partition, teacher.partition
    assert (ours.start, ours.width, ours.valid) == (theirs.start, theirs.width, theirs.valid), (
        f"student and teacher hold different vocabulary columns: {ours} and {theirs}"
    )
    assert ours.group is theirs.group, "student and teacher shards belong to different process groups"
    assert student.logits_Rv.shape == teacher.logits_Rv.shape, "student and teacher logits are of different rows"


def _linear_parts(kind: Divergence, clip: Clip) -> tuple[float, float]:
    """Weights of forward and reverse KL if the divergence is a sum of them: it is known with m and Z. Else zeros."""
    if clip != Clip():
        return 0.0, 0.0
    forward = {"forward_kl": 1.0, "reverse_kl": 0.0, "mixed_kl": kind.parameter}.get(kind.name)
    return (0.0, 0.0) if forward is None else (forward, 1.0 - forward)


class _Divergence(Function):
    """Any divergence of the module's table, each entry between the bounds of a `Clip` or else constant."""

    @staticmethod
    def forward(
        ctx: Any, student_Rv: Tensor, teacher_Rv: Tensor, ours: Reading, theirs: Reading, kind: Divergence, clip: Clip
    ) -> Tensor:
        columns = [ours.columns(student_Rv), theirs.columns(teacher_Rv)]
        scales = ours.scale, theirs.scale
        forward, reverse = _linear_parts(kind, clip)
        models_nR = _models(columns, scales, forward > 0, reverse > 0, ours)
        log_ratio_R = models_nR[2].log() - models_nR[3].log()
        ctx.readings, ctx.kind, ctx.clip = (ours, theirs), kind, clip
        if forward or reverse:
            value_R, mean_R = torch.zeros_like(log_ratio_R), None
            if forward:
                value_R = forward * (models_nR[4] / models_nR[3] + log_ratio_R)
            if reverse:
                mean_R = models_nR[-1] / models_nR[2]
                value_R = value_R + reverse * (mean_R - log_ratio_R)
            ctx.save_for_backward(student_Rv, teacher_Rv, models_nR[:4], mean_R)
            return value_R
        rows_nR = torch.cat([models_nR[:2], models_nR[2:].reciprocal(), log_ratio_R[None]])
        settings = *scales, kind.name, kind.parameter, clip.low, clip.high
        sums = backend.chosen().sums(regions.entry_sums, columns, rows_nR, *settings)
        reduce_in_place(sums, dist.ReduceOp.SUM, ours.partition.group)
        total_R = sums[1] - ENTRIES[kind.name][1](kind.parameter) * sums[2] if len(sums) == 3 else sums[1]
        ctx.save_for_backward(student_Rv, teacher_Rv, rows_nR, total_R)
        return sums[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        ours, theirs = ctx.readings
        student_Rv, teacher_Rv, rows_nR, total_R = ctx.saved_tensors
        kind, clip, scales = ctx.kind, ctx.clip, (ours.scale, theirs.scale)
        logits, factor_R = [student_Rv, theirs.columns(teacher_Rv)], grad_R * ours.scale
        forward, reverse = _linear_parts(kind, clip)
        if not forward and not reverse:
            rows_nR = torch.cat([rows_nR, torch.stack([factor_R, total_R])])
            settings = *scales, kind.name, kind.parameter, clip.low, clip.high
            return ours.gradient(regions.entry_gradient, logits, rows_nR, *settings), *[None] * 5
        over_q_R, over_p_R = factor_R / rows_nR[2], factor_R / rows_nR[3]
        mean_R = torch.zeros_like(factor_R) if total_R is None else total_R
        weights_nR = torch.stack([forward * over_q_R, forward * over_p_R, reverse * over_q_R, mean_R])
        rows_nR = torch.cat([rows_nR[:2], weights_nR])
        return ours.gradient(regions.kl_gradient, logits, rows_nR, *scales, forward > 0, reverse > 0), *[None] * 5


def _models(
    columns: list[Tensor], scales: tuple[float, float], forward: bool, reverse: bool, reading: Reading
) -> Tensor:
    """`regions.pair_sums` over all ranks: [n, R]. One MAX and one SUM all-reduce."""
    group = reading.partition.group
    sums_nR = backend.chosen().sums(regions.pair_sums, columns, None, *scales, forward, reverse)
    own_2R = sums_nR[:2].clone()
    if reduce_in_place(sums_nR[:2], dist.ReduceOp.MAX, group):
        below_2R = below(own_2R, sums_nR[:2])
        weight_2R = below_2R.exp()
        # log p - log q of every id, whose logits so far are relative to this rank's maxima. Where all are excluded
        # there is none to be relative to.
        shift_2R = below_2R.masked_fill(own_2R == torch.finfo(own_2R.dtype).min, 0.0)
        shift_R = shift_2R[1] - shift_2R[0]
        if forward:
            sums_nR[4] = weight_2R[1] * (sums_nR[4] + sums_nR[3] * shift_R)
        if reverse:
            sums_nR[-1] = weight_2R[0] * (sums_nR[-1] - sums_nR[2] * shift_R)
        sums_nR[2:4] *= weight_2R
        reduce_in_place(sums_nR[2:], dist.ReduceOp.SUM, group)
    return sums_nR
