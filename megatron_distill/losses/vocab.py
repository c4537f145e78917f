"""The vocabulary-parallel primitive: log-probs of ids, entropy and top-k of logits that no rank holds whole.

Per row, m is the largest logit over all ranks and Z = sum_v exp(logit_v - m), so that log-sum-exp = m + log Z. The
two are kept apart: exp(logit - m) / Z is several times more exact in fp32 than exp(logit - logsumexp). Each rank sums
over its own columns relative to its own maximum, in one go while a row is in cache (`regions`); then a MAX and a SUM
all-reduce, of a few numbers per row, make them everybody's. A backward pass takes no collective, because softmax is
local once m and Z are known. Nothing here reduces over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from megatron_distill.losses import backend, regions
from megatron_distill.losses.regions import LOWEST, wide
from megatron_distill.types import VocabPartition, VocabShard


def logprob(shard: VocabShard, ids_R: Tensor) -> Tensor:
    """log q(id) of one global id per row: [R]. An id that is none (-100, padding) has -inf, and no gradient."""
    logp_R, _ = _Scores.apply(shard.logits_Rv, Reading.of(shard), ids_R, False)
    return _without_unknown(logp_R, ids_R, shard.partition)


def entropy(shard: VocabShard) -> Tensor:
    """H(q) = -sum_v q_v log q_v in nats: [R]."""
    return _Scores.apply(shard.logits_Rv, Reading.of(shard), None, True)[1]


def logprob_and_entropy(shard: VocabShard, ids_R: Tensor) -> tuple[Tensor, Tensor]:
    """Both from one pass: ([R], [R])."""
    logp_R, entropy_R = _Scores.apply(shard.logits_Rv, Reading.of(shard), ids_R, True)
    return _without_unknown(logp_R, ids_R, shard.partition), entropy_R


@torch.no_grad()
def top_k(shard: VocabShard, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest ids, likeliest first, the lowest id first among equals: global ids [R, K], log-probs [R, K].

    Exact: every rank's own top min(k, v) meet in one all-gather, m and Z with them. Carries no gradient.

    Raises:
        ValueError: the vocabulary has fewer than k ids.
    """
    partition = shard.partition
    if not 1 <= k <= partition.valid:
        raise ValueError(f"k={k}: must be between 1 and the vocabulary size {partition.valid}")
    max_R, sum_R = local_statistics(shard)
    columns = shard.logits_Rv.detach()[:, : partition.valid_width]
    ids_Rk = _lowest_top_k(columns, min(k, partition.valid_width))
    values_Rk = wide(columns.gather(-1, ids_Rk)) / shard.temperature
    # Every rank sends as many, and what stands in for padding has no chance against a real id.
    missing = min(k, partition.width) - ids_Rk.shape[-1]
    values_Rk, ids_Rk = pad(values_Rk, (0, missing), value=float("-inf")), pad(ids_Rk, (0, missing))
    # fp64 holds an id and an fp32 logit exactly, so one message carries both.
    parts = [values_Rk, ids_Rk + partition.start, max_R[:, None], sum_R[:, None]]
    message = torch.cat([part.double() for part in parts], dim=-1)
    gathered = torch.stack(_all_gather(message, partition.group))
    logits_Rc, ids_Rc = (part.movedim(0, 1).flatten(1) for part in gathered[..., :-2].split(ids_Rk.shape[-1], dim=-1))
    total_R = torch.logsumexp(gathered[..., -2] + gathered[..., -1].log(), dim=0)
    # Stable, and candidates come rank by rank: equal logits stay in the order of their ids.
    order_RK = logits_Rc.argsort(dim=-1, descending=True, stable=True)[:, :k]
    logp_RK = logits_Rc.gather(-1, order_RK) - total_R[:, None]
    return ids_Rc.gather(-1, order_RK).long(), logp_RK.to(max_R.dtype)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Reading:
    """How an autograd function reads a shard whose logits it is given: what its context keeps instead of the shard."""

    scale: float
    valid_width: int
    partition: VocabPartition
    disposable: bool
    readers: WeakSet[Any]

    @staticmethod
    def of(shard: VocabShard) -> Reading:
        """A reader for one function, which counts until its backward pass is over or will never be."""
        partition = shard.partition
        reading = Reading(1.0 / shard.temperature, partition.valid_width, partition, shard.disposable, shard.readers)
        if torch.is_grad_enabled() and shard.logits_Rv.requires_grad:
            shard.readers.add(reading)
        return reading

    def columns(self, logits_Rv: Tensor) -> Tensor:
        """The real columns, raw; shares storage."""
        return logits_Rv.detach()[:, : self.valid_width]

    def gradient(self, region: regions.Region, logits: Sequence[Tensor], rows_nR: Tensor, *settings: Any) -> Tensor:
        """What a region gives for the first of `logits` (whole ones; others are real columns): [R, v], in its type.

        In the logits' own place if they are disposable, this is their last reader, and nobody reads the same memory.
        A second backward pass over the same graph is then refused by autograd.
        """
        student_Rv, *others = logits
        columns = self.columns(student_Rv)
        if self._may_overwrite(student_Rv, others):
            gradient_Rv, out_Rv = student_Rv.detach(), columns
        else:
            gradient_Rv = torch.empty_like(student_Rv)
            out_Rv = self.columns(gradient_Rv)
        backend.chosen().write(region, out_Rv, [columns, *others], rows_nR, *settings)
        gradient_Rv[:, self.valid_width :] = 0
        return gradient_Rv

    def zeros(self, logits_Rv: Tensor) -> Tensor:
        """A gradient of zeros, [R, v], to be filled by the caller: in the same place as `gradient` would be."""
        return logits_Rv.detach().zero_() if self._may_overwrite(logits_Rv, []) else torch.zeros_like(logits_Rv)

    def _may_overwrite(self, student_Rv: Tensor, others: Sequence[Tensor]) -> bool:
        """Whether the gradient goes where the logits are, in which case they count as modified; the reader is done."""
        self.readers.discard(self)
        storages = {other.untyped_storage().data_ptr() for other in others}
        if not self.disposable or self.readers or student_Rv.untyped_storage().data_ptr() in storages:
            return False
        increment_version(student_Rv)
        return True


def local_statistics(shard: VocabShard) -> Tensor:
    """This rank's m and Z = sum exp(u - m), with u the logits after temperature: [2, R], wide, without gradient.

    A rank of nothing but padding has the lowest number of the type and 0.
    """
    columns = shard.logits_Rv.detach()[:, : shard.partition.valid_width]
    return backend.chosen().sums(regions.model_sums, [columns], None, 1.0 / shard.temperature, False)


def below(own_max_R: Tensor, max_R: Tensor) -> Tensor:
    """How far this rank's maximum is below everybody's, `LOWEST` at least; its exp takes local sums to global ones."""
    return (own_max_R - max_R).clamp_(min=LOWEST)


def all_reduce(tensors: Sequence[Tensor], op: dist.ReduceOp.RedOpType, group: ProcessGroup | None) -> Sequence[Tensor]:
    """Reduce tensors of one shape over `group` in a single collective; none at all where the group is one rank."""
    stacked = torch.stack(list(tensors))
    reduce_in_place(stacked, op, group)
    return stacked.unbind()


def reduce_in_place(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: ProcessGroup | None) -> bool:
    """All-reduce a contiguous tensor over `group`; False, and nothing done, where the group is one rank."""
    if group is None or group.size() == 1 or not tensor.numel():
        return False
    dist.all_reduce(tensor, op=op, group=group)
    return True


def _without_unknown(logp_R: Tensor, ids_R: Tensor, partition: VocabPartition) -> Tensor:
    """-inf where the id is none: no rank holds its logit, and a believable number would go unnoticed.

    Nothing is read back from the device: the infinite loss stops the step.
    """
    return logp_R.masked_fill((ids_R < 0) | (ids_R >= partition.valid), float("-inf"))


class _Scores(Function):
    """Log-probs of ids, entropy, or both, with their derivatives: d log q(y) = e_y - q, dH = -q (log q + H)."""

    @staticmethod
    def forward(
        ctx: Any, logits_Rv: Tensor, reading: Reading, ids_R: Tensor | None, want_entropy: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        group = reading.partition.group
        columns = reading.columns(logits_Rv)
        sums = backend.chosen().sums(regions.model_sums, [columns], None, reading.scale, want_entropy)
        own_max_R = sums[0].clone()
        if reduce_in_place(sums[:1], dist.ReduceOp.MAX, group):
            below_R = below(own_max_R, sums[0])
            if want_entropy:
                sums[2] += sums[1] * below_R
            sums[1:] *= below_R.exp()
        picked_R = local_R = owned_R = None
        if ids_R is not None:
            local_R = ids_R - reading.partition.start
            owned_R = (local_R >= 0) & (local_R < reading.valid_width)
            local_R = local_R.masked_fill(~owned_R, 0)
            picked_R = wide(logits_Rv.gather(-1, local_R[:, None]).squeeze(-1)) * reading.scale
            picked_R = (picked_R - sums[0]).clamp_(min=LOWEST).masked_fill(~owned_R, 0.0)
            sums = torch.cat([sums, picked_R[None]])
        reduce_in_place(sums[1:], dist.ReduceOp.SUM, group)
        max_R, sum_R = sums[0], sums[1]
        log_sum_R = sum_R.log()
        logp_R = sums[-1] - log_sum_R if ids_R is not None else None
        entropy_R = log_sum_R - sums[2] / sum_R if want_entropy else None
        ctx.reading = reading
        ctx.save_for_backward(logits_Rv, max_R, sum_R, local_R, owned_R, logp_R, entropy_R)
        return logp_R, entropy_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logp_grad_R: Tensor | None, entropy_grad_R: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_Rv, max_R, sum_R, local_R, owned_R, logp_R, entropy_R = ctx.saved_tensors
        # exp(s) (factor + slope s), to which the temperature adds 1/T.
        scale, with_entropy = ctx.reading.scale, entropy_grad_R is not None
        factor_R, slope_R, at_id_R = torch.zeros_like(sum_R), [], None
        if logp_grad_R is not None:
            factor_R = -logp_grad_R
            # By itself, before it is rounded to the logits' type: 1 - q of a likely id is small.
            at_id_R = factor_R * logp_R.expm1()
        if entropy_grad_R is not None:
            factor_R = factor_R - entropy_grad_R * (entropy_R - sum_R.log())
            slope_R = [-entropy_grad_R]
            if at_id_R is not None:
                at_id_R = at_id_R - entropy_grad_R * logp_R.exp() * (logp_R + entropy_R)
        rows = [max_R, *(weight_R * scale / sum_R for weight_R in (factor_R, *slope_R))]
        grad_Rv = ctx.reading.gradient(regions.softmax_gradient, [logits_Rv], torch.stack(rows), scale, with_entropy)
        if at_id_R is not None:
            # By index: scatter of bf16 on a CPU goes through a wide copy of everything.
            here = torch.arange(local_R.numel(), device=local_R.device), local_R
            grad_Rv[here] = torch.where(owned_R, (at_id_R * scale).to(grad_Rv.dtype), grad_Rv[here])
        return grad_Rv, None, None, None


def _lowest_top_k(logits_Rv: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, largest first, the lowest column first among equals: [R, k].

    `torch.topk` picks any of several equals; only rows where the k-th value has equals left outside need a full sort.
    """
    values_Rk, columns_Rk = logits_Rv.topk(k, dim=-1)
    last_R1 = values_Rk[:, -1:]
    cut_R = (logits_Rv == last_R1).sum(-1) > (values_Rk == last_R1).sum(-1)
    if cut_R.any():
        columns_Rk[cut_R] = logits_Rv[cut_R].argsort(dim=-1, descending=True, stable=True)[:, :k]
    columns_Rk = columns_Rk.sort(dim=-1).values
    order_Rk = logits_Rv.gather(-1, columns_Rk).argsort(dim=-1, descending=True, stable=True)
    return columns_Rk.gather(-1, order_Rk)


def _all_gather(tensor: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    if group is None or group.size() == 1 or not tensor.numel():
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(gathered, tensor.contiguous(), group=group)
    return gathered
