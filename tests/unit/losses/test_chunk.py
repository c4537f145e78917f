"""The chunked output layer: the same loss and gradients as the whole, in every odd case that training meets."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from megatron_distill.losses.chunk import linear_loss, linear_rows

ROWS, HIDDEN, VOCABULARY = 11, 6, 9


def _squares(logits: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
    """A loss that depends on which rows it is given."""
    place = torch.arange(rows.start, rows.stop, dtype=logits.dtype)
    value = (logits.logsumexp(-1) ** 2 * (1 + place)).sum()
    return value, {"loss/squares": value, "rows": torch.tensor(float(logits.shape[0]))}


def _inputs(rows: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(rows, HIDDEN, dtype=dtype, requires_grad=True),
        torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True),
    )


@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 1024])
def test_chunks_add_up_to_the_whole(chunk_rows: int) -> None:
    hidden, weight = _inputs()
    expected, sums = _squares(hidden @ weight.T, slice(0, ROWS))
    expected_gradients = torch.autograd.grad(3.0 * expected, (hidden, weight))
    found, found_sums = linear_loss(hidden, weight, _squares, chunk_rows)
    gradients = torch.autograd.grad(3.0 * found, (hidden, weight))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    torch.testing.assert_close(found_sums["loss/squares"], sums["loss/squares"].detach())
    assert found_sums["rows"] == ROWS
    assert not found_sums["loss/squares"].requires_grad


def test_no_more_than_a_chunk_of_logits_exists() -> None:
    seen: list[tuple[int, ...]] = []

    def watch(logits: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        seen.append((*logits.shape, rows.start, rows.stop))
        return _squares(logits, rows)

    linear_loss(*_inputs(), watch, chunk_rows=5)
    assert seen == [(5, VOCABULARY, 0, 5), (5, VOCABULARY, 5, 10), (1, VOCABULARY, 10, 11)]


def test_no_rows_give_zero_and_still_reach_every_parameter() -> None:
    hidden, weight = _inputs(rows=0)
    found, sums = linear_loss(hidden, weight, _squares)
    found.backward()
    assert found.item() == 0.0
    assert sums.keys() == {"loss/squares", "rows"}
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same(frozen: str) -> None:
    hidden, weight = _inputs()
    linear_loss(hidden, weight, _squares, 4)[0].backward()
    fixed = {"hidden": hidden.detach(), "weight": weight.detach()} | {
        name: one.detach().clone().requires_grad_()
        for name, one in (("hidden", hidden), ("weight", weight))
        if name != frozen
    }
    linear_loss(fixed["hidden"], fixed["weight"], _squares, 4)[0].backward()
    for name, original in (("hidden", hidden), ("weight", weight)):
        if name == frozen:
            assert fixed[name].grad is None
        else:
            torch.testing.assert_close(fixed[name].grad, original.grad)


def test_without_grad_it_only_computes_the_loss() -> None:
    hidden, weight = _inputs()
    with torch.no_grad():
        found, sums = linear_loss(hidden, weight, _squares, 4)
    assert not found.requires_grad
    torch.testing.assert_close(found, linear_loss(hidden, weight, _squares, 4)[0].detach())
    torch.testing.assert_close(sums["loss/squares"], found)


def test_a_low_precision_weights_gradient_is_summed_in_fp32() -> None:
    """1024 rows one at a time: a bf16 sum of ones stops growing at 256."""
    rows = 1024
    hidden = torch.ones(rows, 2, dtype=torch.bfloat16)
    weight = torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True)

    def plain_sum(logits: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        return logits.float().sum(), {}

    linear_loss(hidden, weight, plain_sum, chunk_rows=1)[0].backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert (weight.grad == rows).all()


def test_linear_rows_joins_what_it_was_given_and_needs_no_rows() -> None:
    hidden, weight = _inputs()

    def rows_of(logits: Tensor, rows: slice) -> Tensor:
        return torch.stack((logits.logsumexp(-1), torch.arange(rows.start, rows.stop).double()), dim=-1)

    found = linear_rows(hidden, weight, rows_of, chunk_rows=4)
    expected = rows_of(hidden @ weight.T, slice(0, ROWS))
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad
    assert linear_rows(hidden[:0], weight, rows_of).shape == (0, 2)
