"""What the sampled token teaches of a divergence, by enumerating every token that could have been sampled."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_distill.losses.kinds import Divergence
from megatron_distill.losses.sampled import check_sampled, sampled_divergence
from tests.oracles import dense

STUDENT = torch.tensor([1.0, 0.5, -0.5, -2.0, 0.0], dtype=torch.float64)
TEACHER = torch.tensor([0.0, 2.0, -1.0, -3.0, 0.0], dtype=torch.float64)
KINDS = [
    Divergence("reverse_kl"),
    Divergence("jsd", 0.3),
    Divergence("jsd", 1.0),
    Divergence("skew_forward_kl", 0.1),
    Divergence("skew_forward_kl", 0.9),
    Divergence("skew_reverse_kl", 0.1),
    Divergence("skew_reverse_kl", 0.0),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_expected_gradient_is_the_divergences(kind: Divergence) -> None:
    logits = STUDENT.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    sampled = sampled_divergence(logp, TEACHER.log_softmax(-1), kind)
    (logp.exp().detach() * sampled).sum().backward()
    exact = STUDENT.clone().requires_grad_()
    dense.divergence(exact[None], TEACHER[None], 1.0, kind.name, kind.parameter).sum().backward()
    torch.testing.assert_close(logits.grad, exact.grad, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_models_that_agree_have_no_expected_gradient(kind: Divergence) -> None:
    logits = STUDENT.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    (logp.exp().detach() * sampled_divergence(logp, logp.detach(), kind)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-16


def test_the_value_of_the_reverse_kl_is_its_estimate() -> None:
    value = sampled_divergence(torch.tensor([-1.0]), torch.tensor([-3.0]), Divergence("reverse_kl"))
    assert value.tolist() == [2.0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("ours", "theirs"), [(-1e-7, -300.0), (-300.0, -1e-7), (-1e30, 0.0), (0.0, -1e30)])
def test_models_far_apart_stay_finite_in_fp32(kind: Divergence, ours: float, theirs: float) -> None:
    logp = torch.tensor([ours], requires_grad=True)
    value = sampled_divergence(logp, torch.tensor([theirs]), kind)
    value.sum().backward()
    assert value.isfinite().all()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()


def test_the_skew_bounds_what_a_token_can_teach() -> None:
    """The plain forward KL would weigh this token by p/q = e^80."""
    value = sampled_divergence(torch.tensor([-80.0]), torch.tensor([0.0]), Divergence("skew_forward_kl", 0.1))
    assert value.item() == pytest.approx(-0.9 / 0.1)


@pytest.mark.parametrize(
    "kind",
    [
        Divergence("forward_kl"),
        Divergence("jsd", 0.0),
        Divergence("skew_forward_kl", 0.0),
        Divergence("skew_forward_kl", 1.0),
        Divergence("skew_reverse_kl", 1.0),
        Divergence("mixed_kl", 0.5),
        Divergence("total_variation"),
    ],
    ids=str,
)
def test_divergences_without_a_bounded_estimate_are_refused(kind: Divergence) -> None:
    with pytest.raises(ValueError, match=f"{kind.name} of .*: has no estimate by the sampled token"):
        check_sampled(kind)
    with pytest.raises(ValueError, match="has no estimate"):
        sampled_divergence(torch.zeros(1), torch.zeros(1), kind)


def test_beta_one_is_the_reverse_kl() -> None:
    logp, teacher = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    jsd = sampled_divergence(logp, teacher, Divergence("jsd", 1.0))
    torch.testing.assert_close(jsd, sampled_divergence(logp, teacher, Divergence("reverse_kl")))
    assert not math.isclose(
        float(jsd.sum()), float(sampled_divergence(logp, teacher, Divergence("jsd", 0.999)).sum()), rel_tol=1e-2
    )
