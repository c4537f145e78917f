"""DistiLLM: what alpha weights in each direction, and what the skew is for."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_distill.objectives.distillm import DistiLLM
from megatron_distill.types import Fidelity, Origin
from tests.unit.objectives.supervised import Answer, answers, golden, run

FORWARD, REVERSE = "skew_forward_kl", "skew_reverse_kl"
FAR = Answer(
    tokens=(0,),
    student_RV=torch.tensor([[200.0, 0.0]], dtype=torch.float64),
    teacher_RV=torch.tensor([[0.0, 200.0]], dtype=torch.float64),
)
"""Models that agree on nothing."""


def test_values_worked_out_by_hand() -> None:
    assert run(DistiLLM(divergence=FORWARD), [golden()]).loss == pytest.approx(0.4619562913, rel=1e-7)
    assert run(DistiLLM(divergence=REVERSE), [golden()]).loss == pytest.approx(0.5035446022, rel=1e-7)


def test_alpha_weights_the_model_that_the_expectation_is_under() -> None:
    """So the two directions turn into each other when the models change places."""
    (one,) = answers(1)
    turned = Answer(tokens=one.tokens, student_RV=one.teacher_RV, teacher_RV=one.student_RV)
    forward = run(DistiLLM(divergence=FORWARD, alpha=0.3), [one]).loss
    assert forward == pytest.approx(run(DistiLLM(divergence=REVERSE, alpha=0.3), [turned]).loss)
    assert forward != pytest.approx(run(DistiLLM(divergence=FORWARD, alpha=0.7), [one]).loss)


def test_alpha_zero_is_the_plain_kl() -> None:
    assert run(DistiLLM(divergence=FORWARD, alpha=0.0), [golden()]).loss == pytest.approx(0.5739102485)
    assert run(DistiLLM(divergence=REVERSE, alpha=0.0), [golden()]).loss == pytest.approx(0.6783830802)


@pytest.mark.parametrize("divergence", [FORWARD, REVERSE])
def test_the_skew_bounds_the_loss(divergence: str) -> None:
    """Where the models agree on nothing the plain KL is 200 nats."""
    found = run(DistiLLM(divergence=divergence), [FAR])
    assert found.loss == pytest.approx(-math.log(0.1))
    assert run(DistiLLM(divergence=divergence, alpha=0.0), [FAR]).loss == pytest.approx(200.0)


def test_the_mixture_carries_gradient() -> None:
    """It holds the student: with a constant mixture the forward direction would have no gradient at all."""
    (one,) = answers(1)
    q, p = one.student_RV.softmax(-1), one.teacher_RV.softmax(-1)
    r = 0.9 * p * q / (0.1 * p + 0.9 * q)
    found = run(DistiLLM(divergence=FORWARD), [one])
    torch.testing.assert_close(found.gradients[0], q * r.sum() - r)


@pytest.mark.parametrize("divergence", [FORWARD, REVERSE])
def test_each_fidelity_has_its_needs(divergence: str) -> None:
    assert DistiLLM(divergence=divergence).needs.teacher == Fidelity.FULL
    assert DistiLLM(divergence=divergence, support="top_k").needs.teacher == Fidelity.TOP_K
    needs = DistiLLM(divergence=divergence, sampled_token=True).needs
    assert (needs.teacher, needs.origins, needs.unfiltered_samples) == (Fidelity.TOKEN, {Origin.STUDENT}, True)


def test_settings_out_of_range_are_refused() -> None:
    for alpha in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"alpha={alpha}: must be at least 0"):
            DistiLLM(alpha=alpha)
    with pytest.raises(ValueError, match="skew_forward_kl of 0: has no estimate by the sampled token"):
        DistiLLM(divergence=FORWARD, alpha=0.0, sampled_token=True)
