"""The vocabulary-parallel primitive: log-probs of ids, entropy and top-k of logits that no rank holds whole.

Per row, m is the largest logit over all ranks and Z = sum_v exp(logit_v - m), so that log-sum-exp = m + log Z. The
two are kept apart: exp(logit - m) / Z is several times more exact in fp32 than exp(logit - logsumexp). A forward
pass takes one MAX and one SUM all-reduce, whatever is asked of it; a backward pass takes none, because softmax is
local once m and Z are known. Nothing here reduces over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_distill.types import VocabPartition, VocabShard

LOWEST = -1e4
"""A logit further than this below its row's maximum, -inf included, counts as this far below it.

exp(-1e4) is 0 in every floating type, so no probability changes. It turns 0 * inf into 0, and what would be an
infinite divergence between models that exclude different ids into a large finite one.
"""


def logprob(shard: VocabShard, ids_R: Tensor) -> Tensor:
    """log q(id) of one global id per row: [R]. An id that is none (-100, padding) has -inf, and no gradient."""
    logp_R, _ = _Scores.apply(shard.logits_Rv, shard.partition, ids_R, False)
    return _without_unknown(logp_R, ids_R, shard.partition)


def entropy(shard: VocabShard) -> Tensor:
    """H(q) = -sum_v q_v log q_v in nats: [R]."""
    return _Scores.apply(shard.logits_Rv, shard.partition, None, True)[1]


def logprob_and_entropy(shard: VocabShard, ids_R: Tensor) -> tuple[Tensor, Tensor]:
    """Both from one pass: ([R], [R])."""
    logp_R, entropy_R = _Scores.apply(shard.logits_Rv, shard.partition, ids_R, True)
    return _without_unknown(logp_R, ids_R, shard.partition), entropy_R


@torch.no_grad()
def top_k(shard: VocabShard, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest ids, likeliest first, the lowest id first among equals: global ids [R, K], log-probs [R, K].

    Exact: every rank's own top min(k, v) meet in one all-gather, m and Z with them. Carries no gradient.

    Raises:
        ValueError: the vocabulary has fewer than k ids.
    """
    logits_Rv, partition = shard.logits_Rv, shard.partition
    if not 1 <= k <= partition.valid:
        raise ValueError(f"k={k}: must be between 1 and the vocabulary size {partition.valid}")
    ids_Rk = _lowest_top_k(logits_Rv, min(k, partition.width))
    # Finite on a rank of nothing but padding too: -inf minus -inf is not a number.
    max_R = logits_Rv.amax(-1).clamp_(min=torch.finfo(logits_Rv.dtype).min)
    sum_R = shifted_by(logits_Rv, max_R).exp_().sum(-1)
    # fp64 holds an id and an fp32 logit exactly, so one message carries both.
    parts = [logits_Rv.gather(-1, ids_Rk), ids_Rk + partition.start, max_R[:, None], sum_R[:, None]]
    message = torch.cat([part.double() for part in parts], dim=-1)
    gathered = torch.stack(_all_gather(message, partition.group))
    logits_Rc, ids_Rc = (part.movedim(0, 1).flatten(1) for part in gathered[..., :-2].split(ids_Rk.shape[-1], dim=-1))
    total_R = torch.logsumexp(gathered[..., -2] + gathered[..., -1].log(), dim=0)
    # Stable, and candidates come rank by rank: equal logits stay in the order of their ids.
    order_RK = logits_Rc.argsort(dim=-1, descending=True, stable=True)[:, :k]
    logp_RK = logits_Rc.gather(-1, order_RK) - total_R[:, None]
    return ids_Rc.gather(-1, order_RK).long(), logp_RK.to(logits_Rv.dtype)


def all_reduce(tensors: Sequence[Tensor], op: dist.ReduceOp.RedOpType, group: ProcessGroup | None) -> Sequence[Tensor]:
    """Reduce tensors of one shape over `group` in a single collective; none at all where the group is one rank."""
    stacked = torch.stack(list(tensors))
    if group is not None and group.size() > 1 and stacked.numel():
        dist.all_reduce(stacked, op=op, group=group)
    return stacked.unbind()


def maxima(group: ProcessGroup | None, *logits: Tensor) -> Sequence[Tensor]:
    """The largest logit of each row over all ranks, for several models in one collective: [R] each."""
    return all_reduce([one.amax(-1) for one in logits], dist.ReduceOp.MAX, group)


def shifted_by(logits_Rv: Tensor, max_R: Tensor) -> Tensor:
    """A fresh copy of the logits minus their row's maximum, not below `LOWEST`: exp of it never overflows."""
    return (logits_Rv - max_R[:, None]).clamp_(min=LOWEST)


def _without_unknown(logp_R: Tensor, ids_R: Tensor, partition: VocabPartition) -> Tensor:
    """-inf where the id is none: no rank holds its logit, and a believable number would go unnoticed.

    Nothing is read back from the device: the infinite loss stops the step.
    """
    return logp_R.masked_fill((ids_R < 0) | (ids_R >= partition.valid), float("-inf"))


class _Scores(Function):
    """Log-probs of ids, entropy, or both, with their derivatives: d log q(y) = e_y - q, dH = -q (log q + H)."""

    @staticmethod
    def forward(
        ctx: Any, logits_Rv: Tensor, partition: VocabPartition, ids_R: Tensor | None, want_entropy: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        (max_R,) = maxima(partition.group, logits_Rv)
        shifted_Rv = shifted_by(logits_Rv, max_R)
        wanted = []
        local_R = owned_R = None
        if ids_R is not None:
            local_R = ids_R - partition.start
            owned_R = (local_R >= 0) & (local_R < partition.width)
            local_R = local_R.clamp(0, partition.width - 1)
            picked_R = shifted_Rv.gather(-1, local_R[:, None]).squeeze(-1)
            wanted.append(picked_R.masked_fill(~owned_R, 0.0))
        exp_Rv = shifted_Rv.exp() if want_entropy else shifted_Rv.exp_()
        wanted.insert(0, exp_Rv.sum(-1))
        if want_entropy:
            wanted.append(exp_Rv.mul_(shifted_Rv).sum(-1))
        sums = all_reduce(wanted, dist.ReduceOp.SUM, partition.group)
        sum_R, log_sum_R = sums[0], sums[0].log()
        logp_R = sums[1] - log_sum_R if ids_R is not None else None
        entropy_R = log_sum_R - sums[-1] / sum_R if want_entropy else None
        ctx.save_for_backward(logits_Rv, max_R, sum_R, local_R, owned_R, entropy_R)
        return logp_R, entropy_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logp_grad_R: Tensor | None, entropy_grad_R: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_Rv, max_R, sum_R, local_R, owned_R, entropy_R = ctx.saved_tensors
        shifted_Rv = shifted_by(logits_Rv, max_R)
        if entropy_grad_R is None:
            assert logp_grad_R is not None
            grad_Rv = shifted_Rv.exp_().mul_((logp_grad_R / -sum_R)[:, None])
        else:
            grad_Rv = shifted_Rv.exp().div_(sum_R[:, None])
            factor_Rv = shifted_Rv.add_((entropy_R - sum_R.log())[:, None]).mul_(-entropy_grad_R[:, None])
            grad_Rv.mul_(factor_Rv if logp_grad_R is None else factor_Rv.sub_(logp_grad_R[:, None]))
        if logp_grad_R is not None:
            at_id_R = logp_grad_R.masked_fill(~owned_R, 0.0)
            grad_Rv.scatter_add_(-1, local_R[:, None], at_id_R[:, None])
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
