"""Divergences from a teacher that named its k likeliest ids only, with closed-form gradients in the student's logits.

S are the k ids, Q and P what student and teacher give them together. A divergence is a sum of entries l(q, p)
(`pointwise`): one per id of S, and with `tail` one more, of mass 1 - Q and 1 - P, for all other ids together. With s
the slope of an entry, s_tail = 0 where there is no such entry, and u the student's logits after temperature,

    d/du_j = s_j - q_j sum s                  on S           q and p over S alone with `renormalise`, where
    d/du_j = q_j (s_tail / (1-Q) - sum s)     off S          d/du is 0 off S; p alone with `renormalise_teacher`

Slopes come less c q; a clipped or omitted entry, which has none, puts c q_j sum q and at its own place -c q_j back.
Off S the gradient is a number per row times softmax, so all that the backward pass reads of [R, v] is the logits.
1 - Q is never computed as such: it is summed over the other ids, relative to the largest of them, so that a tail
300 nats down has its exact gradient. The teacher's ids and log-probs are the same on every rank; a student's id is
owned by one. Sums over S are made by the owners and meet as one number per row: two all-reduces forward for the
KLs, three for anything else and whatever is clipped, none backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_distill.losses import backend, regions
from megatron_distill.losses.kinds import Clip, Divergence, Outside
from megatron_distill.losses.pointwise import ENTRIES, canonical
from megatron_distill.losses.regions import LOWEST, wide
from megatron_distill.losses.vocab import Reading, all_reduce, below
from megatron_distill.types import TopK, VocabPartition, VocabShard

_FLOOR = -1e30
"""A logit of S counts as no less than this, so that S has a largest one even where the student excludes all of it."""


def top_k_divergence(
    student: VocabShard, teacher: TopK, kind: Divergence, outside: Outside = "tail", clip: Clip | None = None
) -> Tensor:
    """`kind` of divergence between the student and the k ids that a teacher named, per row in nats: [R].

    With all ids of the vocabulary named, each `outside` gives the full divergence. `clip` bounds every entry, the
    tail's included, after any renormalisation. A row whose ids repeat, or are none of the vocabulary, is infinite and
    has no gradient: it stops the step, and nothing is read back from the device for it.

    Raises:
        ValueError: no such `outside`, more ids than the vocabulary has, or a skew divergence with alpha = 1.
    """
    if outside not in ("tail", "renormalise", "renormalise_teacher", "truncate"):
        raise ValueError(f"outside={outside}: must be tail, renormalise, renormalise_teacher or truncate")
    if teacher.ids_RK.shape[-1] > student.partition.valid:
        raise ValueError(f"k={teacher.ids_RK.shape[-1]}: the vocabulary has {student.partition.valid} ids")
    setting = _Setting(canonical(kind), outside, clip)
    value_R = _TopK.apply(student.logits_Rv, Reading.of(student), teacher, setting)
    return value_R.masked_fill(_bad_rows(teacher.ids_RK, student.partition.valid), float("inf"))


def _bad_rows(ids_RK: Tensor, vocabulary: int) -> Tensor:
    """Rows with an id twice, whose probability would count twice, or with one that no rank holds: bool [R]."""
    sorted_RK = ids_RK.sort(dim=-1).values
    twice_R = (sorted_RK[:, 1:] == sorted_RK[:, :-1]).any(-1)
    return twice_R | (sorted_RK[:, 0] < 0) | (sorted_RK[:, -1] >= vocabulary)


@dataclass(frozen=True, slots=True)
class _Setting:
    kind: Divergence
    outside: Outside
    clip: Clip | None

    @property
    def linear(self) -> bool:
        """Whether sums over S are linear in something known before the softmax is, so that two all-reduces do."""
        return self.clip is None and self.kind.name in ("forward_kl", "reverse_kl")

    @property
    def constant(self) -> float:
        """c."""
        return ENTRIES[self.kind.name][1](self.kind.parameter)

    def entries(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, slopes less c q, and the q of those that a bound has made constant (0 of others)."""
        q, ratio = log_q.exp(), log_p - log_q
        value, slope = ENTRIES[self.kind.name][0](q, log_p.exp(), ratio, self.kind.parameter)
        if self.clip is None or (self.clip.low, self.clip.high) == (None, None):
            return value, slope, torch.zeros_like(q)
        bounded = value.clamp(self.clip.low, self.clip.high)
        return bounded, slope.masked_fill(bounded != value, 0.0), q.masked_fill(bounded == value, 0.0)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where the ids of S lie on this rank.

    An id of another rank points at the first id of its row that is this rank's, or at column 0 where there is none,
    and `put` writes there what that one gets, or what stands there anyhow.
    """

    index_RK: Tensor
    owned_RK: Tensor | None
    """None where this rank owns them all."""

    @staticmethod
    def of(ids_RK: Tensor, partition: VocabPartition) -> _Columns:
        if partition.group is None or partition.group.size() == 1:
            return _Columns(ids_RK.clamp(0, partition.width - 1), None)
        local_RK = ids_RK - partition.start
        owned_RK = (local_RK >= 0) & (local_RK < partition.width)
        first_R1 = _first(owned_RK)
        other_R1 = local_RK.gather(-1, first_R1).masked_fill(~owned_RK.gather(-1, first_R1), 0)
        return _Columns(torch.where(owned_RK, local_RK, other_R1), owned_RK)

    def owned(self, values_RK: Tensor, otherwise: float = 0.0) -> Tensor:
        """`values_RK`, and `otherwise` where an id is another rank's."""
        return values_RK if self.owned_RK is None else values_RK.masked_fill(~self.owned_RK, otherwise)

    def put(self, into_Rv: Tensor, values_RK: Tensor) -> None:
        """Write the values of this rank's ids into their columns."""
        if self.owned_RK is not None:
            values_RK = torch.where(self.owned_RK, values_RK, values_RK.gather(-1, _first(self.owned_RK)))
            values_RK = torch.where(self.owned_RK.any(-1, keepdim=True), values_RK, into_Rv[:, :1])
        # By index: scatter of bf16 on a CPU goes through a wide copy of everything.
        into_Rv[torch.arange(len(self.index_RK), device=self.index_RK.device)[:, None], self.index_RK] = values_RK

    def hide(self, logits_Rv: Tensor) -> Tensor:
        """Give this rank's ids of S the logit -inf, so that regions leave them out; what is to be put back: [R, K].

        That costs k numbers per row where a mask would cost v. The very logits are changed, and are to be put back
        before anybody else can look; `data` keeps it from autograd, rightly so: for a graph that has saved them
        nothing has happened.
        """
        before_RK = logits_Rv.data.gather(-1, self.index_RK)
        self.put(logits_Rv.data, torch.full_like(before_RK, float("-inf")))
        return before_RK

    def put_back(self, logits_Rv: Tensor, before_RK: Tensor) -> None:
        """Undo `hide`."""
        self.put(logits_Rv.data, before_RK)


def _first(owned_RK: Tensor) -> Tensor:
    """Place of each row's first true: [R, 1]."""
    return owned_RK.to(torch.uint8).argmax(-1, keepdim=True)


class _TopK(Function):
    @staticmethod
    def forward(ctx: Any, logits_Rv: Tensor, reading: Reading, teacher: TopK, setting: _Setting) -> Tensor:
        partition = reading.partition
        columns = _Columns.of(teacher.ids_RK, partition)
        dtype = torch.float64 if logits_Rv.dtype == torch.float64 else torch.float32
        log_p_RK, log_p_tail_R = _teacher(teacher, setting.outside, partition.valid, dtype)
        softmax = _Softmax.of(logits_Rv, reading, columns, log_p_RK, setting)
        value_RK, slope_RK, fixed_RK = setting.entries(softmax.log_q_RK, log_p_RK)
        q_RK = softmax.log_q_RK.exp()
        if setting.linear:
            value_R, slope_R = softmax.linear_sums(log_p_RK, setting.kind)
            fixed_R = torch.zeros_like(value_R)
        else:
            local = [columns.owned(part_RK).sum(-1) for part_RK in (value_RK, slope_RK, fixed_RK)]
            value_R, slope_R, fixed_R = all_reduce(local, dist.ReduceOp.SUM, partition.group)

        off_R = None
        if setting.outside != "renormalise":
            q_tail_R = softmax.log_q_tail_R.exp()
            if log_p_tail_R is None:
                slope_tail_R, fixed_tail_R = torch.zeros_like(q_tail_R), q_tail_R
            else:
                value_tail_R, slope_tail_R, fixed_tail_R = setting.entries(softmax.log_q_tail_R, log_p_tail_R)
                value_R, slope_R = value_R + value_tail_R, slope_R + slope_tail_R
            fixed_R = fixed_R + fixed_tail_R
            off_R = slope_tail_R - q_tail_R * slope_R + setting.constant * (q_tail_R * fixed_R - fixed_tail_R)
            # The largest logit of the tail alone adds 1 to its sum; where there is no tail, no column will ask.
            off_R = off_R / softmax.tail_sum_R.clamp(min=1.0)
        on_RK = slope_RK - q_RK * slope_R[:, None]
        if setting.constant:
            on_RK += setting.constant * (q_RK * fixed_R[:, None] - fixed_RK)
        ctx.columns, ctx.reading = columns, reading
        ctx.save_for_backward(logits_Rv, softmax.tail_max_R, on_RK, off_R)
        return value_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        logits_Rv, tail_max_R, on_RK, off_R = ctx.saved_tensors
        columns, scale = ctx.columns, ctx.reading.scale
        if off_R is None:
            grad_Rv = ctx.reading.zeros(logits_Rv)
        else:
            # Columns of S, where this may overflow, are written next.
            rows_2R = torch.stack([tail_max_R, off_R * grad_R * scale])
            grad_Rv = ctx.reading.gradient(regions.softmax_gradient, [logits_Rv], rows_2R, scale, False)
        columns.put(grad_Rv, (on_RK * (grad_R * scale)[:, None]).to(grad_Rv.dtype))
        return grad_Rv, None, None, None


def _teacher(teacher: TopK, outside: Outside, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """log p of each id [R, K], and of all others together [R] where those are an entry.

    The teacher's log-probs are as exact as their type, and so is its tail: it is no less than that type's epsilon.
    """
    log_p_RK = teacher.top_logp_RK.double()
    total_R1 = log_p_RK.logsumexp(-1, keepdim=True)
    log_tail_R = None
    if outside in ("renormalise", "renormalise_teacher"):
        log_p_RK = log_p_RK - total_R1
    elif outside == "tail" and teacher.ids_RK.shape[-1] < vocabulary:
        least = torch.finfo(teacher.top_logp_RK.dtype).eps
        log_tail_R = (-torch.expm1(total_R1[:, 0].clamp(max=-least))).log().to(dtype)
    return log_p_RK.clamp(min=LOWEST).to(dtype), log_tail_R


@dataclass(frozen=True, slots=True, kw_only=True)
class _Softmax:
    """The student's log-probs of the entries, the same on every rank but for those [R, K]."""

    log_q_RK: Tensor
    """Meaningless where another rank owns the id."""
    log_sum_R: Tensor
    """log sum exp(u - max), over what `q` is normalised over."""
    top_R: Tensor
    """Q."""
    picked_R: Tensor | None
    """forward KL: sum over S of p (u - max); reverse KL: sum over S of q (u - max - log p)."""
    log_q_tail_R: Tensor
    tail_max_R: Tensor
    tail_sum_R: Tensor
    """Off S q = exp(u - tail_max) / tail_sum * (1-Q)."""

    @staticmethod
    def of(logits_Rv: Tensor, reading: Reading, columns: _Columns, log_p_RK: Tensor, setting: _Setting) -> _Softmax:
        group, scale = reading.partition.group, reading.scale
        if setting.outside == "renormalise":
            before_RK, rest_2R = logits_Rv.gather(-1, columns.index_RK), None
        else:
            before_RK = columns.hide(logits_Rv)
            real = [reading.columns(logits_Rv)]
            try:
                rest_2R = backend.chosen().sums(regions.model_sums, real, None, scale, False)
            finally:
                columns.put_back(logits_Rv, before_RK)
        logits_RK = (wide(before_RK) * scale).clamp(min=_FLOOR)
        top_max_R = columns.owned(logits_RK, float("-inf")).amax(-1)
        if rest_2R is None:
            own_max_R, own_sum_R = torch.full_like(top_max_R, _FLOOR), torch.zeros_like(top_max_R)
        else:
            own_max_R, own_sum_R = rest_2R
        top_max_R, tail_max_R = all_reduce([top_max_R, own_max_R], dist.ReduceOp.MAX, group)
        max_R = torch.maximum(top_max_R, tail_max_R)

        shifted_RK = (logits_RK - max_R[:, None]).clamp_(min=LOWEST)
        exp_RK = shifted_RK.exp()
        local = [own_sum_R * below(own_max_R, tail_max_R).exp(), columns.owned(exp_RK).sum(-1)]
        if setting.linear:
            forward = setting.kind.name == "forward_kl"
            picked_RK = log_p_RK.exp() * shifted_RK if forward else exp_RK * (shifted_RK - log_p_RK)
            local.append(columns.owned(picked_RK).sum(-1))
        tail_sum_R, top_sum_R, *picked = all_reduce(local, dist.ReduceOp.SUM, group)

        tail_shift_R = below(tail_max_R, max_R)
        sum_R = top_sum_R + tail_sum_R * tail_shift_R.exp()
        log_sum_R = sum_R.log()
        if picked and not forward:
            picked[0] = picked[0] / sum_R
        return _Softmax(
            log_q_RK=shifted_RK - log_sum_R[:, None],
            log_sum_R=log_sum_R,
            top_R=top_sum_R / sum_R,
            picked_R=picked[0] if picked else None,
            log_q_tail_R=(tail_shift_R + tail_sum_R.log() - log_sum_R).clamp(min=LOWEST),
            tail_max_R=tail_max_R,
            tail_sum_R=tail_sum_R,
        )

    def linear_sums(self, log_p_RK: Tensor, kind: Divergence) -> tuple[Tensor, Tensor]:
        """Values and slopes of an unclipped KL, summed over S: [R] each."""
        assert self.picked_R is not None
        if kind.name == "reverse_kl":
            value_R = self.picked_R - self.top_R * self.log_sum_R
            return value_R, value_R
        p_RK = log_p_RK.exp()
        mass_R = p_RK.sum(-1)
        return (p_RK * log_p_RK).sum(-1) + mass_R * self.log_sum_R - self.picked_R, -mass_R
