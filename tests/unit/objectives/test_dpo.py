"""DPO: numbers worked out by hand, exactness of the linear form, and what the sigmoid does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_distill.objectives.dpo import DPO
from megatron_distill.types import Fidelity
from tests.unit.objectives.steps import CHOSEN, REJECTED, Response, response, run


def _with_reference(one: Response, total: float | None = None) -> Response:
    """A reference whose log-probs sum to `total`, or random ones."""
    count = len(one.tokens)
    logp_R = -torch.rand(count).double() * 3
    if total is not None:
        logp_R = torch.full((count,), total / count, dtype=torch.float64)
    return replace(one, reference_logp_R=logp_R)


PAIR = [_with_reference(CHOSEN, -1.5), _with_reference(REJECTED, -2.0)]


def _pairs() -> list[Response]:
    lengths = {"a": (2, 5), "b": (7, 1), "c": (3, 3)}
    return [
        _with_reference(response(group, sample, 1.0 - sample, torch.randint(4, (length,)).tolist()))
        for group, both in lengths.items()
        for sample, length in enumerate(both)
    ]


@pytest.mark.parametrize(("beta", "loss"), [(0.1, 0.6876147339884409), (0.001, 0.6930917037415372)])
def test_a_pair_worked_out_by_hand(beta: float, loss: float) -> None:
    assert run(DPO(beta=beta), PAIR).loss == pytest.approx(loss, rel=1e-12)


def _exact(pairs: Sequence[Response], beta: float, temperature: float) -> tuple[float, dict[tuple[str, int], Tensor]]:
    """Value and gradient by differentiating the loss itself, pairs side by side."""
    leaves = {(one.group, one.sample): one.logits_RV.clone().requires_grad_() for one in pairs}
    ratios = {}
    for one in pairs:
        logp_RV = (leaves[one.group, one.sample] / temperature).log_softmax(-1)
        taken_R = logp_RV[torch.arange(len(one.tokens)), torch.tensor(one.tokens)]
        assert one.reference_logp_R is not None
        ratios[one.group, one.sample] = (taken_R - one.reference_logp_R).sum()
    groups = sorted({one.group for one in pairs})
    loss = torch.stack([-logsigmoid(beta * (ratios[name, 0] - ratios[name, 1])) for name in groups]).mean()
    loss.backward()
    return float(loss.detach()), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("budget", [1, 7, 1000])
@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_value_and_gradient_of_the_linear_form_are_exact_also_where_a_pair_is_cut(beta: float, budget: int) -> None:
    pairs = _pairs()
    found = run(DPO(beta=beta, temperature=1.3), pairs, budget)
    loss, gradients = _exact(pairs, beta, 1.3)
    assert found.loss == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-10, atol=1e-13)


def test_a_student_at_its_reference_starts_from_log_two_with_half_the_slope() -> None:
    pairs = []
    for one in (CHOSEN, REJECTED):
        logp_R = one.logits_RV.log_softmax(-1)[torch.arange(len(one.tokens)), torch.tensor(one.tokens)]
        pairs.append(replace(one, reference_logp_R=logp_R))
    found = run(DPO(beta=0.2), pairs)
    assert found.loss == pytest.approx(math.log(2))
    p = CHOSEN.logits_RV.softmax(-1)[0, 3]
    assert float(found.gradients["a", 0][0, 3]) == pytest.approx(-0.5 * 0.2 * (1 - float(p)))


def test_pairs_far_apart_stay_finite_and_the_right_ones_are_let_be() -> None:
    won = [_with_reference(CHOSEN, -9e4), _with_reference(REJECTED, 0.0)]
    lost = [_with_reference(CHOSEN, 0.0), _with_reference(REJECTED, -9e4)]
    found = run(DPO(beta=1.0), won)
    assert found.loss == pytest.approx(0.0, abs=1e-12)
    assert not found.gradients["a", 0].any()
    found = run(DPO(beta=1.0), lost)
    assert found.loss == pytest.approx(9e4, rel=1e-4)
    assert torch.isfinite(found.gradients["a", 1]).all()
    assert found.gradients["a", 1].any()


def test_log_probs_of_whole_responses_are_summed_not_averaged() -> None:
    """Length counts: doubling a response doubles its score."""
    once, twice = (response("a", 0, 1.0, (1,) * count, [[0.0, 1, 0, 0]] * count) for count in (1, 2))
    other = _with_reference(response("a", 1, 0.0, (1,), [[0.0, 0, 0, 0]]), 0.0)
    margins = []
    for one in (once, twice):
        metrics = run(DPO(), [_with_reference(one, 0.0), other]).metrics
        margins.append(metrics["objective/chosen"].value)
    assert margins[1] == pytest.approx(2 * margins[0])


def test_what_is_logged_is_the_implicit_reward() -> None:
    metrics = run(DPO(beta=0.1), PAIR).metrics
    assert metrics["objective/chosen"].value == pytest.approx(0.1 * (-1.0667130736 + 1.5), rel=1e-6)
    assert metrics["objective/rejected"].value == pytest.approx(0.1 * (-1.6776697883 + 2.0), rel=1e-6)
    assert metrics["objective/accuracy"].value == 1.0


def test_it_asks_for_pairs_and_a_reference() -> None:
    needs = DPO().needs
    assert needs.pairs
    assert needs.teacher == Fidelity.TOKEN
    assert needs.teacher_names == {"reference"}
    assert needs.teacher_logprobs
    assert needs.student_logprobs == "recompute"
    with pytest.raises(ValueError, match=r"beta=0\.0: must be above 0"):
        DPO(beta=0.0)
