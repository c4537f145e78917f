"""Terms to one scalar."""

from __future__ import annotations

import pytest
import torch

from megatron_distill.losses.reduce import reduce
from megatron_distill.types import Term


def test_weighted_sums_over_their_own_denominators_add_up() -> None:
    value = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    terms = {
        "near": Term(value_R=value, weight_R=torch.tensor([1.0, 0.0, 1.0])),
        "far": Term(value_R=2 * value, weight_R=torch.tensor([0.0, 0.5, 0.0])),
    }
    scalar, sums = reduce(terms, {"near": 8.0, "far": 4.0, "unused": 1.0})
    scalar.backward()
    assert scalar.item() == 4.0 / 8.0 + 2.0 / 4.0
    assert {name: one.item() for name, one in sums.items()} == {"loss/near": 0.5, "loss/far": 0.5}
    assert not sums["loss/near"].requires_grad
    assert value.grad is not None
    assert value.grad.tolist() == [0.125, 0.25, 0.125]


def test_rows_of_a_step_add_up_whatever_the_cut() -> None:
    value, weight = torch.randn(9), torch.rand(9)
    whole, _ = reduce({"term": Term(value_R=value, weight_R=weight)}, {"term": 9.0})
    parts = [
        reduce({"term": Term(value_R=value[rows], weight_R=weight[rows])}, {"term": 9.0})[0]
        for rows in (slice(0, 2), slice(2, 2), slice(2, 9))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_a_term_without_a_denominator_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="without a denominator"):
        reduce({"term": Term(value_R=torch.ones(1), weight_R=torch.ones(1))}, {"other": 1.0})
