"""The chunked output layer: the same loss and gradients as the whole, in every odd case that training meets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_distill.losses.chunk import linear_loss, linear_rows
from megatron_distill.testing.assertions import assert_close

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


@pytest.mark.parametrize("with_buffer", [False, True])
def test_a_second_backward_pass_is_refused(with_buffer: bool) -> None:
    """The first one gave its gradients away."""
    hidden, weight = _inputs()
    buffer = torch.zeros_like(weight).detach() if with_buffer else None
    found, _ = linear_loss(hidden, weight, _squares, add_to=buffer)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


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


@pytest.mark.parametrize("chunk_rows", [4, 1024])
def test_the_weights_gradient_is_added_to_a_buffer_on_top_of_what_is_there(chunk_rows: int) -> None:
    hidden, weight = _inputs()
    expected = torch.autograd.grad(3.0 * _squares(hidden @ weight.T, slice(0, ROWS))[0], (hidden, weight))
    buffer = torch.full_like(weight, 7.0).detach()
    found, sums = linear_loss(hidden, weight, _squares, chunk_rows, scale=3.0, add_to=buffer)
    found.backward()
    torch.testing.assert_close(buffer - 7.0, expected[1])
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(found.detach(), 3.0 * sums["loss/squares"])
    assert weight.grad is None


def test_what_is_added_already_cannot_be_scaled() -> None:
    hidden, weight = _inputs()
    found, _ = linear_loss(hidden, weight, _squares, add_to=torch.zeros_like(weight))
    with pytest.raises(RuntimeError, match="must not be scaled again"):
        (2.0 * found).backward()


def test_without_grad_nothing_is_added() -> None:
    hidden, weight = _inputs()
    buffer = torch.zeros_like(weight)
    with torch.no_grad():
        linear_loss(hidden, weight, _squares, add_to=buffer)
    assert not buffer.any()


@pytest.mark.parametrize("with_buffer", [False, True])
def test_padding_rows_of_the_weight_are_not_multiplied(with_buffer: bool) -> None:
    """They may hold anything: their logits are 0, and so is their gradient."""
    hidden, weight = _inputs()
    with torch.no_grad():
        weight[7:] = float("nan")
    buffer = torch.zeros_like(weight) if with_buffer else None

    def real(logits: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert not logits[:, 7:].any()
        return _squares(logits[:, :7], rows)

    expected = torch.autograd.grad(_squares(hidden @ weight[:7].T, slice(0, ROWS))[0], (hidden, weight))
    linear_loss(hidden, weight, real, 4, valid=7, add_to=buffer)[0].backward()
    found = weight.grad if buffer is None else buffer
    assert found is not None
    torch.testing.assert_close(found[:7], expected[1][:7])
    assert not found[7:].any()
    torch.testing.assert_close(hidden.grad, expected[0])


def _low_precision(device: str) -> None:
    """The buffer gets the product of the rounded factors, itself not rounded: an update of 1e-3 on 1000 is seen."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=generator).bfloat16().to(device).requires_grad_()
    weight = torch.randn(20_000, 16, generator=generator).bfloat16().to(device)
    seen: list[Tensor] = []

    def watch(logits: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits.register_hook(lambda grad: seen.append(grad.clone()))
        return logits.float().square().sum() * 1e-4, {}

    buffer = torch.zeros(weight.shape, device=device)
    linear_loss(hidden, weight, watch, 32, add_to=buffer)[0].backward()
    expected = torch.cat(seen).double().t() @ hidden.detach().double()
    assert_close(buffer, expected, "weight gradient")


def test_a_low_precision_gradient_is_added_in_fp32() -> None:
    _low_precision("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_low_precision_gradient_is_added_in_fp32_on_a_gpu() -> None:
    _low_precision("cuda")


class _Storages(TorchDispatchMode):
    """Sizes in bytes of the storages that operations within made, each once."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.kept = [one.untyped_storage() for one in known]
        self.known = {storage.data_ptr() for storage in self.kept}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in self.known:
                self.kept.append(one.untyped_storage())  # alive, so that its address means one thing
                self.known.add(one.untyped_storage().data_ptr())
                self.sizes.append(one.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_weights_size_is_made_beside_the_buffer(dtype: torch.dtype) -> None:
    """And one buffer of logits serves all chunks."""
    hidden = torch.randn(64, 32, dtype=dtype, requires_grad=True)
    weight = torch.randn(20_000, 32, dtype=dtype, requires_grad=True)
    buffer = torch.zeros(weight.shape)
    addresses: list[int] = []

    def plain_sum(logits: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        addresses.append(logits.data_ptr())
        return logits.sum(dtype=torch.float32), {}

    with _Storages([hidden, weight, buffer]) as made:
        linear_loss(hidden, weight, plain_sum, 8, add_to=buffer)[0].backward()
    assert len(set(addresses)) == 1
    assert max(made.sizes) < weight.untyped_storage().nbytes()
    assert buffer.any()


def test_linear_rows_joins_what_it_was_given_and_needs_no_rows() -> None:
    hidden, weight = _inputs()

    def rows_of(logits: Tensor, rows: slice) -> Tensor:
        return torch.stack((logits.logsumexp(-1), torch.arange(rows.start, rows.stop).double()), dim=-1)

    found = linear_rows(hidden, weight, rows_of, chunk_rows=4)
    expected = rows_of(hidden @ weight.T, slice(0, ROWS))
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad
    assert linear_rows(hidden[:0], weight, rows_of).shape == (0, 2)
