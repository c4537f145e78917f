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
                                                           d/du = (1-beta) q (log(q/m) - KL(q||m))
    skew forward KL  KL(p||m)                              m = alpha p + (1-alpha) q
    skew reverse KL  KL(q||m)                              m = alpha q + (1-alpha) p
    total variation  sum_v |q_v - p_v| / 2

The teacher is a constant. Everything stays in log space; nothing is added to a probability to make its log finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

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
    arithmetic = _arithmetic(canonical(kind), clip or Clip())
    with torch.no_grad():
        constants = Reading.of(teacher)
    return _Divergence.apply(student.logits_Rv, teacher.logits_Rv, Reading.of(student), constants, arithmetic)


def _check_same_columns(student: VocabShard, teacher: VocabShard) -> None:
    """Columns that are not the same ids would give a plausible and wrong number, so this is always checked."""
    ours, theirs = student.partition, teacher.partition
    assert (ours.start, ours.width, ours.valid) == (theirs.start, theirs.width, theirs.valid), (
        f"student and teacher hold different vocabulary columns: {ours} and {theirs}"
    )
    assert ours.group is theirs.group, "student and teacher shards belong to different process groups"
    assert student.logits_Rv.shape == teacher.logits_Rv.shape, "student and teacher logits are of different rows"


def _arithmetic(kind: Divergence, clip: Clip) -> _Arithmetic:
    """How to compute it. A clipped entry is no longer linear in anything."""
    if clip == Clip():
        match kind.name:
            case "forward_kl":
                return _KL(forward=1.0)
            case "reverse_kl":
                return _KL(forward=0.0)
            case "mixed_kl":
                return _KL(forward=kind.parameter)
            case "jsd":
                return _JSD(beta=kind.parameter)
    return _Entries(kind, clip)


class _Divergence(Function):
    """The collectives and the bookkeeping that all divergences share; the formulas are an `_Arithmetic`'s."""

    @staticmethod
    def forward(
        ctx: Any, student_Rv: Tensor, teacher_Rv: Tensor, ours: Reading, theirs: Reading, arithmetic: _Arithmetic
    ) -> Tensor:
        columns, scales = [ours.columns(student_Rv), theirs.columns(teacher_Rv)], (ours.scale, theirs.scale)
        group = ours.partition.group
        models_nR = _models(columns, scales, *arithmetic.crossed, group)
        value_R, mean_R = arithmetic.value(columns, scales, models_nR, group)
        ctx.readings, ctx.arithmetic = (ours, theirs), arithmetic
        ctx.save_for_backward(student_Rv, teacher_Rv, models_nR[:4], mean_R)
        return value_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        ours, theirs = ctx.readings
        student_Rv, teacher_Rv, models_4R, mean_R = ctx.saved_tensors
        region, rows, settings = ctx.arithmetic.gradient(models_4R, mean_R, grad_R * ours.scale)
        logits, scales = [student_Rv, theirs.columns(teacher_Rv)], (ours.scale, theirs.scale)
        return ours.gradient(region, logits, torch.stack(rows), *scales, *settings), None, None, None, None


class _Arithmetic(Protocol):
    """Regions of one kind of divergence, and what numbers per row they need. `models_nR` are those of `_models`."""

    @property
    def crossed(self) -> tuple[bool, bool]:
        """Whether `_models` shall sum log(p/q) under p, and log(q/p) under q."""
        ...

    def value(
        self, columns: list[Tensor], scales: tuple[float, float], models_nR: Tensor, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        """The divergence, and the sum that its gradient needs: [R] each."""
        ...

    def gradient(
        self, models_4R: Tensor, mean_R: Tensor, factor_R: Tensor
    ) -> tuple[regions.Region, list[Tensor], tuple[Any, ...]]:
        """Region, numbers per row and settings; the factor is the incoming gradient over the temperature."""
        ...


@dataclass(frozen=True, slots=True)
class _KL:
    """w KL(p||q) + (1-w) KL(q||p), known together with m and Z."""

    forward: float

    @property
    def crossed(self) -> tuple[bool, bool]:
        return self.forward > 0, self.forward < 1

    def value(
        self, columns: list[Tensor], scales: tuple[float, float], models_nR: Tensor, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        log_ratio_R = models_nR[2].log() - models_nR[3].log()
        forward_R = models_nR[4] / models_nR[3] + log_ratio_R
        if self.forward == 1:
            return forward_R, torch.zeros_like(forward_R)
        mean_R = models_nR[-1] / models_nR[2]
        reverse_R = mean_R - log_ratio_R
        return reverse_R if self.forward == 0 else self.forward * forward_R + (1 - self.forward) * reverse_R, mean_R

    def gradient(
        self, models_4R: Tensor, mean_R: Tensor, factor_R: Tensor
    ) -> tuple[regions.Region, list[Tensor], tuple[Any, ...]]:
        over_q_R, over_p_R = factor_R / models_4R[2], factor_R / models_4R[3]
        forward, reverse = self.forward, 1 - self.forward
        rows = [*models_4R[:2], forward * over_q_R, forward * over_p_R, reverse * over_q_R, mean_R]
        return regions.kl_gradient, rows, self.crossed


@dataclass(frozen=True, slots=True)
class _JSD:
    beta: float

    @property
    def crossed(self) -> tuple[bool, bool]:
        return False, False

    def value(
        self, columns: list[Tensor], scales: tuple[float, float], models_nR: Tensor, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        log_ratio_R = models_nR[2].log() - models_nR[3].log()
        rows_nR = torch.stack([*models_nR[:2], log_ratio_R])
        sums_nR = backend.chosen().sums(regions.jsd_sums, columns, rows_nR, *scales, self.beta)
        reduce_in_place(sums_nR, dist.ReduceOp.SUM, group)
        mean_R = sums_nR[1] / models_nR[2]
        return self.beta * (sums_nR[0] / models_nR[3]) - (1 - self.beta) * mean_R, mean_R

    def gradient(
        self, models_4R: Tensor, mean_R: Tensor, factor_R: Tensor
    ) -> tuple[regions.Region, list[Tensor], tuple[Any, ...]]:
        log_ratio_R = models_4R[2].log() - models_4R[3].log()
        rows = [*models_4R[:2], log_ratio_R, (1 - self.beta) * factor_R / models_4R[2], mean_R]
        return regions.jsd_gradient, rows, (self.beta,)


@dataclass(frozen=True, slots=True)
class _Entries:
    """Any divergence of `pointwise`, each entry between the bounds of a `Clip` or else constant.

    With a_v = 1 where the entry is within the bounds, and s_v + c q_v the slope, the gradient is
    a_j s_j - q_j sum_v a_v s_v + c q_j (a_j - sum_v a_v q_v).
    """

    kind: Divergence
    clip: Clip

    @property
    def crossed(self) -> tuple[bool, bool]:
        return False, False

    @property
    def settings(self) -> tuple[Any, ...]:
        return self.kind.name, self.kind.parameter, self.clip.low, self.clip.high

    def value(
        self, columns: list[Tensor], scales: tuple[float, float], models_nR: Tensor, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        rows_nR = torch.stack(self._rows(models_nR))
        sums_nR = backend.chosen().sums(regions.entry_sums, columns, rows_nR, *scales, *self.settings)
        reduce_in_place(sums_nR, dist.ReduceOp.SUM, group)
        value_R, slope_R, *inactive = sums_nR
        for inactive_R in inactive:
            slope_R = slope_R - ENTRIES[self.kind.name][1](self.kind.parameter) * inactive_R
        return value_R.clone(), slope_R

    def gradient(
        self, models_4R: Tensor, mean_R: Tensor, factor_R: Tensor
    ) -> tuple[regions.Region, list[Tensor], tuple[Any, ...]]:
        return regions.entry_gradient, [*self._rows(models_4R), factor_R, mean_R], self.settings

    def _rows(self, models_nR: Tensor) -> list[Tensor]:
        q_max_R, p_max_R, q_sum_R, p_sum_R = models_nR[:4]
        return [q_max_R, p_max_R, q_sum_R.reciprocal(), p_sum_R.reciprocal(), q_sum_R.log() - p_sum_R.log()]


def _models(
    columns: list[Tensor], scales: tuple[float, float], forward: bool, reverse: bool, group: ProcessGroup | None
) -> Tensor:
    """`regions.pair_sums` over all ranks: [n, R]. One MAX and one SUM all-reduce."""
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
