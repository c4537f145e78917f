"""A loss over logits that never exist as a whole: the output layer and the loss, some rows at a time.

[R, v] logits and their gradient are the largest tensors of a distillation step. Here they live for one chunk of rows:
logits, loss and the gradients of hidden states and output weight are made in one go, in the forward pass. The
backward pass only multiplies by the incoming gradient. (After Liger's fused linear losses, arXiv 2410.10989.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

type RowsLoss = Callable[[Tensor, slice], tuple[Tensor, Mapping[str, Tensor]]]
"""(logits [C, v], which rows they are) -> (scalar, named detached scalars); everything adds up over chunks."""

type RowsFunction = Callable[[Tensor, slice], Tensor]
"""(logits [C, v], which rows they are) -> a tensor with one entry per row, [C, ...]."""


def linear_loss(
    hidden_RH: Tensor, weight_vH: Tensor, rows_loss: RowsLoss, chunk_rows: int = 1024
) -> tuple[Tensor, dict[str, Tensor]]:
    """`rows_loss` of `hidden @ weight.T` in chunks of rows: the scalar, which carries gradients, and the sums.

    Under tensor parallelism `weight_vH` is this rank's shard, and the gradient of `hidden_RH` is this rank's *part*:
    the caller sums it over the tensor-parallel group (Megatron's copy_to / gather_from_sequence mapping before this
    call does). `rows_loss` may use collectives; all ranks of the group see the same chunks. Nothing that `rows_loss`
    closes over gets a gradient. With R = 0 it is called once on no rows, so that the gradients, all zero, and
    the names of the sums are still there.

    Args:
        hidden_RH: states that the output layer reads, of the dtype in which logits are made.
        weight_vH: the output weight; its gradient is summed over chunks in fp32 (fp64 for fp64).
        chunk_rows: rows per chunk; below a thousand or so the matrix products become inefficient.
    """
    assert chunk_rows > 0, f"chunk_rows={chunk_rows}"
    sums: dict[str, Tensor] = {}
    with_grad = torch.is_grad_enabled()
    return _LinearLoss.apply(hidden_RH, weight_vH, rows_loss, chunk_rows, sums, with_grad), sums


@torch.no_grad()
def linear_rows(hidden_RH: Tensor, weight_vH: Tensor, rows_function: RowsFunction, chunk_rows: int = 1024) -> Tensor:
    """`rows_function` of `hidden @ weight.T` in chunks of rows, joined again: [R, ...]. Carries no gradient."""
    rows = _chunks(hidden_RH.shape[0], chunk_rows)
    return torch.cat([rows_function(hidden_RH[one] @ weight_vH.t(), one) for one in rows])


def _chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    """Slices that cover `rows`; one empty slice if there are none."""
    return (slice(start, min(start + chunk_rows, rows)) for start in range(0, max(rows, 1), chunk_rows))


class _LinearLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_vH: Tensor,
        rows_loss: RowsLoss,
        chunk_rows: int,
        sums: dict[str, Tensor],
        with_grad: bool,
    ) -> Tensor:
        hidden_grad, weight_grad = _gradient_buffers(hidden_RH, weight_vH, with_grad)
        total: Tensor | None = None
        for rows in _chunks(hidden_RH.shape[0], chunk_rows):
            hidden_CH = hidden_RH[rows]
            logits_Cv = (hidden_CH @ weight_vH.t()).requires_grad_(with_grad)
            with torch.set_grad_enabled(with_grad):
                scalar, parts = rows_loss(logits_Cv, rows)
            if hidden_grad is not None or weight_grad is not None:
                (grad_Cv,) = torch.autograd.grad(scalar, logits_Cv)
                del logits_Cv
                if hidden_grad is not None:
                    torch.mm(grad_Cv, weight_vH, out=hidden_grad[rows])
                if weight_grad is not None:
                    _add_product(weight_grad, grad_Cv.t(), hidden_CH)
            total = scalar.detach() if total is None else total + scalar.detach()
            for name, part in parts.items():
                sums[name] = sums[name] + part.detach() if name in sums else part.detach()
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight_vH.dtype
        assert total is not None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        # In place, for they are large and nobody else has them; autograd refuses a second backward pass after it.
        if hidden_grad is not None:
            hidden_grad.mul_(grad.to(hidden_grad.dtype))
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(grad.to(weight_grad.dtype)).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a second tensor of that size where the types allow it."""
    if total.dtype == left.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _gradient_buffers(hidden_RH: Tensor, weight_vH: Tensor, with_grad: bool) -> tuple[Tensor | None, Tensor | None]:
    """Where gradients go: hidden rows in their own dtype, each written once; the weight, a sum, in at least fp32."""
    wide = torch.float64 if weight_vH.dtype == torch.float64 else torch.float32
    hidden_grad = torch.empty_like(hidden_RH) if with_grad and hidden_RH.requires_grad else None
    weight_grad = torch.zeros_like(weight_vH, dtype=wide) if with_grad and weight_vH.requires_grad else None
    return hidden_grad, weight_grad
