"""What each estimator teaches, by enumerating every token that the student could have sampled."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_distill.losses.policy import clipped_surrogate, k1, k2, k3, policy_gradient
from megatron_distill.losses.vocab import logprob
from megatron_distill.types import VocabPartition, VocabShard
from tests.oracles import dense

STUDENT = torch.tensor([1.0, 0.5, -0.5, -2.0], dtype=torch.float64)
TEACHER = torch.tensor([0.0, 2.0, -1.0, -3.0], dtype=torch.float64)


def _every_token(logits_V: Tensor) -> Tensor:
    """log q of each id, one row per id."""
    rows = logits_V.expand(4, 4)
    return logprob(VocabShard(rows, VocabPartition(start=0, width=4, valid=4, group=None)), torch.arange(4))


def _expected_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """sum_y q(y) d loss(y) / d logits, q held constant."""
    logits = STUDENT.clone().requires_grad_()
    logp = _every_token(logits)
    (logp.detach().exp() * loss(logp, _every_token(TEACHER))).sum().backward()
    assert logits.grad is not None
    return logits.grad


def _gradient(divergence: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    logits = STUDENT.clone().requires_grad_()
    divergence(logits[None], TEACHER[None], 1.0).sum().backward()
    assert logits.grad is not None
    return logits.grad


REVERSE, FORWARD, NOTHING = _gradient(dense.reverse_kl), _gradient(dense.forward_kl), torch.zeros(4).double()


@pytest.mark.parametrize(
    ("use", "gradient"),
    [
        (lambda logp, teacher: policy_gradient(logp, -k1(logp, teacher)), REVERSE),
        (k1, NOTHING),
        (k2, REVERSE),
        (k3, FORWARD),
    ],
    ids=["k1 as advantage", "k1 back-propagated", "k2 back-propagated", "k3 back-propagated"],
)
def test_expected_gradient(use: Callable[[Tensor, Tensor], Tensor], gradient: Tensor) -> None:
    torch.testing.assert_close(_expected_gradient(use), gradient, rtol=0, atol=1e-15)


def test_k3_as_advantage_is_not_the_reverse_kl() -> None:
    biased = _expected_gradient(lambda logp, teacher: policy_gradient(logp, -k3(logp, teacher)))
    assert (biased - REVERSE).abs().max() > 0.1


@pytest.mark.parametrize("estimator", [k1, k3])
def test_estimators_are_unbiased_for_the_reverse_kl(estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    logp, teacher = _every_token(STUDENT), _every_token(TEACHER)
    assert (logp.exp() * estimator(logp, teacher)).sum().item() == pytest.approx(0.6783830802, abs=1e-10)


def test_golden_advantage_and_gradient_of_one_token() -> None:
    logits = STUDENT.clone().requires_grad_()
    logp = _every_token(logits)
    advantage = -k1(logp, _every_token(TEACHER)).detach()
    assert advantage.tolist() == pytest.approx([-1.5445373054, 0.9554626946, -1.0445373054, -1.5445373054], abs=1e-10)
    policy_gradient(logp, advantage)[1].backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0.5083741351, -0.6471181951, 0.1134336022, 0.0253104578], abs=1e-10)


def test_another_behaviour_policy_scales_by_the_importance_ratio() -> None:
    logp = torch.tensor([-1.0], requires_grad=True)
    value = policy_gradient(logp, torch.tensor([2.0]), behaviour_logp_R=torch.tensor([-1.5]))
    value.sum().backward()
    assert logp.grad is not None
    assert value.item() == pytest.approx(-2.0 * torch.tensor(0.5).exp().item())
    assert logp.grad.item() == pytest.approx(value.item())


def test_large_importance_ratios_are_truncated_and_keep_their_token() -> None:
    """A token 300 nats likelier than it was sampled with counts as one of the limit; the others as before."""
    logp = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    mu, advantage = torch.tensor([-1.2, -2.0, -301.0]), torch.tensor([2.0, -3.0, 1.0])
    for limit, ratios in ((2.0, [0.2, math.log(2), math.log(2)]), (None, [0.2, 1.0, 20.0])):
        value = policy_gradient(logp, advantage, mu, limit)
        expected = -torch.tensor(ratios).exp() * advantage
        torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), logp)[0], expected, rtol=1e-5, atol=0)


RATIOS = [1e-3, 0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 2.9, 3.1, 20.0]


def _value_and_slope(
    advantage: float, low: float, high: float, dual: float | None = None
) -> tuple[list[float], list[float]]:
    """At each of `RATIOS`: the surrogate, and its derivative in log q(y)."""
    old = torch.linspace(-7.0, -0.1, len(RATIOS), dtype=torch.float64)
    logp = (old + torch.tensor(RATIOS, dtype=torch.float64).log()).requires_grad_()
    value = clipped_surrogate(logp, old, torch.full_like(old, advantage), low, high, dual)
    value.sum().backward()
    assert logp.grad is not None
    return value.tolist(), logp.grad.tolist()


@pytest.mark.parametrize("advantage", [1.5, -0.5, 0.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (1.0, 0.28)])
def test_clipped_surrogate_is_the_larger_of_the_two_losses(advantage: float, low: float, high: float) -> None:
    values, slopes = _value_and_slope(advantage, low, high)
    for ratio, value, slope in zip(RATIOS, values, slopes, strict=True):
        clipped = min(max(ratio, 1 - low), 1 + high)
        assert value == pytest.approx(max(-advantage * ratio, -advantage * clipped), abs=1e-12)
        beyond = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
        assert slope == pytest.approx(0.0 if beyond else -advantage * ratio, abs=1e-12)


def test_only_dual_clip_stops_a_likely_token_of_negative_advantage() -> None:
    _, slopes = _value_and_slope(-1.0, 0.2, 0.2)
    assert slopes[-1] == pytest.approx(20.0)
    values, slopes = _value_and_slope(-1.0, 0.2, 0.2, dual=3.0)
    assert values[-3:] == pytest.approx([2.9, 3.0, 3.0])
    assert slopes[-3:] == pytest.approx([2.9, 0.0, 0.0])
    assert _value_and_slope(1.0, 0.2, 0.2, dual=3.0) == _value_and_slope(1.0, 0.2, 0.2)


def test_the_surrogates_agree_where_the_weights_have_not_moved() -> None:
    logp, advantage = torch.tensor([-1.0, -4.0], requires_grad=True), torch.tensor([2.0, -1.0])
    slopes = [
        torch.autograd.grad(surrogate.sum(), logp)[0]
        for surrogate in (
            clipped_surrogate(logp, logp.detach(), advantage, 0.2, 0.2),
            policy_gradient(logp, advantage),
        )
    ]
    assert slopes[0].tolist() == slopes[1].tolist() == [-2.0, 1.0]


def test_clipped_surrogate_is_finite_300_nats_away_and_constants_get_no_gradient() -> None:
    logp = torch.tensor([-300.0, 0.0, -300.0, 0.0], requires_grad=True)
    old = torch.tensor([0.0, -300.0, 0.0, -300.0], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)
    value = clipped_surrogate(logp, old, advantage, 0.2, 0.2)
    value.sum().backward()
    assert value.isfinite().all()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()
    assert old.grad is None
    assert advantage.grad is None


def test_k3_is_finite_300_nats_away() -> None:
    logp = torch.tensor([-300.0, 0.0], requires_grad=True)
    value = k3(logp, torch.tensor([0.0, -300.0]))
    value.sum().backward()
    assert value.tolist() == pytest.approx([math.exp(20.0) - 21.0, 299.0])
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([0.0, 1.0])
