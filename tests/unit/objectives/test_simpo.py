"""SimPO: numbers worked out by hand, exactness of the linear form, and its limit."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from megatron_distill.objectives.redi import REDI
from megatron_distill.objectives.simpo import SimPO
from tests.unit.objectives.steps import CHOSEN, REJECTED, response, run

PAIRS = [
    response(group, sample, 1.0 - sample, [(3 * place + group_index) % 4 for place in range(length)])
    for group_index, (group, both) in enumerate({"a": (2, 5), "b": (7, 1), "c": (3, 3)}.items())
    for sample, length in enumerate(both)
]


def test_a_pair_worked_out_by_hand() -> None:
    found = run(SimPO(beta=2.0, gamma=1.0), [CHOSEN, REJECTED])
    # lengths travel in fp32
    assert found.loss == pytest.approx(1.2757066905955172, rel=1e-7)


@pytest.mark.parametrize("budget", [1, 7, 1000])
def test_value_and_gradient_of_the_linear_form_are_exact_also_where_a_pair_is_cut(budget: int) -> None:
    leaves = {(one.group, one.sample): one.logits_RV.clone().requires_grad_() for one in PAIRS}
    means = {
        (one.group, one.sample): leaves[one.group, one.sample]
        .log_softmax(-1)[torch.arange(len(one.tokens)), torch.tensor(one.tokens)]
        .mean()
        for one in PAIRS
    }
    loss = torch.stack([-logsigmoid(2.5 * (means[name, 0] - means[name, 1]) - 0.7) for name in "abc"]).mean()
    loss.backward()
    found = run(SimPO(beta=2.5, gamma=0.7), PAIRS, budget)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(found.gradients[name], leaf.grad, rtol=1e-6, atol=1e-9)


def test_length_alone_changes_nothing() -> None:
    """The same token over and over has the same mean; DPO's sum would grow."""
    other = response("a", 1, 0.0, (1,), [[0.0, 0, 0, 0]])
    losses = [run(SimPO(), [response("a", 0, 1.0, (1,) * n, [[0.0, 1, 0, 0]] * n), other]).loss for n in (1, 2, 9)]
    assert losses == pytest.approx([losses[0]] * 3)


@pytest.mark.parametrize(("beta", "error"), [(1e-2, 5e-3), (1e-4, 5e-5)])
def test_a_small_beta_tends_to_the_symmetric_loss_of_redi(beta: float, error: float) -> None:
    gamma = 0.5
    found, limit = run(SimPO(beta=beta, gamma=gamma), PAIRS), run(REDI(alpha=1.0), PAIRS)
    scale = beta / (1 + math.exp(-gamma))
    for name, gradient in limit.gradients.items():
        torch.testing.assert_close(found.gradients[name] / scale, gradient, rtol=error, atol=error * 0.1)


def test_it_needs_pairs_and_no_teacher_and_checks_its_settings() -> None:
    assert SimPO().needs.pairs
    assert SimPO().needs.teacher is None
    with pytest.raises(ValueError, match=r"beta=-1\.0: must be above 0"):
        SimPO(beta=-1.0)
    with pytest.raises(ValueError, match=r"gamma=-0\.5: must be 0 or more"):
        SimPO(gamma=-0.5)


def test_a_pair_far_apart_stays_finite() -> None:
    wrong = [
        response("a", 0, 1.0, (0,), [[-300.0, 0, 0, 0]]),
        response("a", 1, 0.0, (0,), [[300.0, 0, 0, 0]]),
    ]
    found = run(SimPO(beta=10.0), wrong)
    assert found.loss == pytest.approx(10 * (301.1 - 0.0) + 1, rel=1e-3)
    assert all(torch.isfinite(gradient).all() for gradient in found.gradients.values())
