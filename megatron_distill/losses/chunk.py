"""A loss over logits that never exist as a whole: the output layer and the loss, some rows at a time.

[R, v] logits and their gradient are the largest tensors of a distillation step. Here they live for one chunk of rows,
in one buffer that all chunks use in turn: logits, loss and the gradients of hidden states and output weight are made
in one go, in the forward pass. The backward pass only multiplies by the incoming gradient. (After Liger's fused linear
losses, arXiv 2410.10989.) The gradient of the weight may go straight to where an optimizer sums it, so that no second
tensor of the weight's size ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

type RowsLoss = Callable[[Tensor, slice], tuple[Tensor, Mapping[str, Tensor]]]
"""(logits [C, v], which rows they are) -> (scalar, named detached scalars); everything adds up over chunks.

The logits' memory is free for it to take: their gradient may be written over them. The next chunk's will be.
"""

type RowsFunction = Callable[[Tensor, slice], Tensor]
"""(logits [C, v], which rows they are) -> a tensor with one entry per row, [C, ...]."""

_BLOCK = 8192
"""Rows of an output weight whose gradient is made wide at one time, where matrix products cannot do so themselves."""


def linear_loss(
    hidden_RH: Tensor,
    weight_vH: Tensor,
    rows_loss: RowsLoss,
    chunk_rows: int = 1024,
    *,
    scale: float = 1.0,
    valid: int | None = None,
    add_to: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`scale` times `rows_loss` of `hidden @ weight.T`, chunk by chunk, which carries gradients; and the plain sums.

    Under tensor parallelism `weight_vH` is this rank's shard, and the gradient of `hidden_RH` is this rank's *part*:
    the caller sums it over the tensor-parallel group (Megatron's copy_to / gather_from_sequence mapping before this
    call does). `rows_loss` may use collectives; all ranks of the group see the same chunks. Nothing that `rows_loss`
    closes over gets a gradient. With R = 0 it is called once on no rows, so that the gradients, all zero, and
    the names of the sums are still there.

    With `add_to` the weight's gradient is added there at once, in the forward pass, and autograd gets none. Nobody can
    multiply it afterwards: whatever scales the loss must be in `scale`, and the gradient that comes back must be 1. A
    loss scaler between this loss and `backward` would break that, and fails.

    Args:
        hidden_RH: states that the output layer reads, of the dtype in which logits are made.
        weight_vH: the output weight; its gradient is summed over chunks in fp32 (fp64 for fp64).
        rows_loss: from logits to a scalar.
        chunk_rows: rows per chunk; below a thousand or so the matrix products become inefficient.
        scale: factor of the loss and of all gradients, not of the sums.
        valid: leading rows of the weight that are real; logits of the others are 0, and their gradient must be.
        add_to: [v, H] of the same dtype as the sum, e.g. Megatron's `main_grad`.
    """
    assert chunk_rows > 0, f"chunk_rows={chunk_rows}"
    sums: dict[str, Tensor] = {}
    work = _Work(rows_loss, chunk_rows, scale, weight_vH.shape[0] if valid is None else valid, sums)
    if not torch.is_grad_enabled():
        return _forward(hidden_RH, weight_vH, work, None, None), sums
    if add_to is not None:
        assert add_to.shape == weight_vH.shape, f"add_to: {tuple(add_to.shape)}, weight: {tuple(weight_vH.shape)}"
        weight_vH = weight_vH.detach()
    return _LinearLoss.apply(hidden_RH, weight_vH, work, add_to), sums


@torch.no_grad()
def linear_rows(hidden_RH: Tensor, weight_vH: Tensor, rows_function: RowsFunction, chunk_rows: int = 1024) -> Tensor:
    """`rows_function` of `hidden @ weight.T` in chunks of rows, joined again: [R, ...]. Carries no gradient."""
    rows = _chunks(hidden_RH.shape[0], chunk_rows)
    return torch.cat([rows_function(hidden_RH[one] @ weight_vH.t(), one) for one in rows])


def _chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    """Slices that cover `rows`; one empty slice if there are none."""
    return (slice(start, min(start + chunk_rows, rows)) for start in range(0, max(rows, 1), chunk_rows))


@dataclass(frozen=True, slots=True)
class _Work:
    """What is done to every chunk."""

    rows_loss: RowsLoss
    chunk_rows: int
    scale: float
    valid: int
    sums: dict[str, Tensor] = field(default_factory=dict)

    def on(self, logits_Cv: Tensor, rows: slice, with_grad: bool) -> tuple[Tensor, Tensor | None]:
        """The chunk's scalar, and the gradient of the scaled one; all else of its graph is gone on return."""
        logits_Cv = logits_Cv.detach().requires_grad_(with_grad)
        with torch.set_grad_enabled(with_grad):
            scalar, parts = self.rows_loss(logits_Cv, rows)
        for name, part in parts.items():
            self.sums[name] = self.sums[name] + part.detach() if name in self.sums else part.detach()
        if not with_grad:
            return scalar.detach(), None
        (grad_Cv,) = torch.autograd.grad(scalar, logits_Cv, torch.full_like(scalar, self.scale))
        return scalar.detach(), grad_Cv


def _forward(
    hidden_RH: Tensor, weight_vH: Tensor, work: _Work, hidden_grad: Tensor | None, weight_grad: Tensor | None
) -> Tensor:
    """The scaled total; gradients are written to `hidden_grad` and added to `weight_grad`."""
    real_vH = weight_vH.detach()[: work.valid]
    with_grad = hidden_grad is not None or weight_grad is not None
    logits = hidden_RH.new_empty(min(work.chunk_rows, hidden_RH.shape[0]), weight_vH.shape[0])
    logits[:, work.valid :] = 0
    total: Tensor | None = None
    for rows in _chunks(hidden_RH.shape[0], work.chunk_rows):
        hidden_CH = hidden_RH.detach()[rows]
        logits_Cv = logits[: hidden_CH.shape[0]]
        torch.mm(hidden_CH, real_vH.t(), out=logits_Cv[:, : work.valid])
        scalar, grad_Cv = work.on(logits_Cv, rows, with_grad)
        if grad_Cv is not None:
            grad_Cv = grad_Cv[:, : work.valid]
            if hidden_grad is not None:
                torch.mm(grad_Cv, real_vH, out=hidden_grad[rows])
            if weight_grad is not None:
                _add_product(weight_grad[: work.valid], grad_Cv.t(), hidden_CH)
        total = scalar if total is None else total + scalar
    assert total is not None
    return total * work.scale


class _LinearLoss(Function):
    @staticmethod
    def forward(ctx: Any, hidden_RH: Tensor, weight_vH: Tensor, work: _Work, add_to: Tensor | None) -> Tensor:
        hidden_grad = torch.empty_like(hidden_RH) if hidden_RH.requires_grad else None
        weight_grad = add_to
        if add_to is None and weight_vH.requires_grad:
            wide = torch.float64 if weight_vH.dtype == torch.float64 else torch.float32
            weight_grad = torch.zeros_like(weight_vH, dtype=wide)
        total = _forward(hidden_RH, weight_vH, work, hidden_grad, weight_grad)
        ctx.save_for_backward(hidden_grad, None if add_to is not None else weight_grad)
        ctx.added, ctx.weight_dtype = add_to is not None, weight_vH.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        gradients = [one for one in (hidden_grad, weight_grad) if one is not None]
        if ctx.added:
            # Checked where the gradient is: on a GPU nobody waits for the answer.
            torch._assert_async(grad == 1, "the weight's gradient is added already: the loss must not be scaled again")
        # On a CPU it is cheap to look whether it is 1, as it mostly is; on a GPU looking would mean waiting.
        elif grad.is_cuda or grad.item() != 1.0:
            for one in gradients:
                # in place, for they are large and nobody else has them
                one.mul_(grad.to(one.dtype))
        # They are given away: autograd is to refuse a second backward pass.
        increment_version(gradients)
        return hidden_grad, None if weight_grad is None else weight_grad.to(ctx.weight_dtype), None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a second tensor of that size; a sum wider than the factors is summed wide."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        right = right.to(total.dtype)
        for start in range(0, total.shape[0], _BLOCK):
            some = slice(start, start + _BLOCK)
            total[some].addmm_(left[some].to(total.dtype), right)
