"""One optimizer step's forward and backward passes, and the one owner of loss scaling.

An objective's loss is normalised over the whole step before it gets here: what the ranks and micro-batches hold are
*parts of one sum*. Megatron (0.19), told `calculate_per_token_loss`, sums gradients over micro-batches and over data
and context parallel ranks, and divides them by the sum of the token counts that the loss function returns. Each
micro-batch returns a count of one here, so the divisor is the number of micro-batches in the step, known beforehand;
every part is multiplied by it and the two cancel. No other module knows.

The output weight's gradient goes straight into the fp32 buffer in which Megatron sums it over micro-batches and over
ranks, in the forward pass of its micro-batch (`losses.chunk`). Where the weight is the embedding too, autograd still
brings the embedding's part later: Megatron's hook adds it to the same buffer. A copy of a tied weight on the last
pipeline stage has a buffer of its own, and Megatron sums the two. There is no loss scaler: fp16 is not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_distill.losses.chunk import linear_loss
from megatron_distill.models.network import Network
from megatron_distill.types import Batch, MicroBatch


class MicroLoss(Protocol):
    """What a step asks of its loss; objectives know nothing of it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Keys of the sums that `__call__` returns and that add up to the loss, the same on every rank."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Keys of other sums that it returns, which are only logged, the same on every rank."""

    def __call__(self, logits_Cv: Tensor, micro: int, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """Raw logits of some rows of micro-batch `micro` to their part of the loss, and detached sums to log."""


def forward_backward(network: Network, batch: Batch, loss: MicroLoss, chunk_rows: int) -> dict[str, float]:
    """Leave the gradient of the whole step's loss in the model; give the step's sums, equal on all ranks."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    mesh, valid = network.runtime.mesh, network.partition.valid_width
    scale = len(batch.micro) * mesh.sizes.dp * mesh.sizes.cp

    def forward(micro: Iterator[tuple[int, MicroBatch]], _: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        index, packed = next(micro)
        first = network.my_rows(packed.rows).start

        def rows_loss(logits_Cv: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            return loss(logits_Cv, index, slice(rows.start + first, rows.stop + first))

        def judge(hidden_RH: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            head, buffer = network.head(), gradient_buffer(network)
            part, sums = linear_loss(hidden_RH, head, rows_loss, chunk_rows, scale=scale, valid=valid, add_to=buffer)
            return part, torch.ones((), dtype=torch.int, device=part.device), sums

        return network.hidden(packed), judge

    with network.runtime.backend.megatron():
        parts = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(enumerate(batch.micro)),
            model=[network.module],
            num_microbatches=len(batch.micro),
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
    return _total(network, parts, loss.names + loss.figures)


def gradient_buffer(network: Network) -> Tensor | None:
    """Where the output weight's gradient is summed; None if it has to come through autograd.

    With `overlap_grad_reduce` Megatron sends a bucket off as soon as autograd has brought every gradient in it: it
    would wait for this one forever. Megatron's own fused layers bring a dummy and set `grad_added_to_main_grad`, so
    that it is not added; here nothing is brought, and what autograd brings for a tied weight must be added.
    """
    settings = getattr(network.module, "ddp_config", None)
    if settings is None or settings.overlap_grad_reduce:
        return None
    buffer = network.head().main_grad
    assert isinstance(buffer, Tensor)
    return buffer


def _total(network: Network, parts: list[dict[str, Tensor]], names: tuple[str, ...]) -> dict[str, float]:
    """Sums over micro-batches, context-parallel and data-parallel ranks, in float64, on every rank."""
    totals = torch.zeros(len(names), dtype=torch.float64, device=network.runtime.backend.device)
    for part in parts:
        for place, name in enumerate(names):
            if name in part:
                totals[place] += part[name].double()
    mesh = network.runtime.mesh
    totals = mesh.from_last_stage(mesh.total_over_data(totals))
    return dict(zip(names, totals.tolist(), strict=True))
