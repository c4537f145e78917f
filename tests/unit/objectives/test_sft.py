"""Supervised and rejection fine-tuning: who counts, and how much."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_distill.objectives.sft import SFT
from tests.unit.objectives.steps import Response, response, run

SAMPLES = [
    response("a", 0, 1.0, (1, 2, 3)),
    response("a", 1, 0.0, (1, 2, 3, 0, 1, 2)),
    response("b", 0, None, (2, 2)),
    response("b", 1, 1.0, (3,)),
]


def _nll(one: Response) -> torch.Tensor:
    return -one.logits_RV.log_softmax(-1)[torch.arange(len(one.tokens)), torch.tensor(one.tokens)]


@pytest.mark.parametrize("budget", [1, 1000])
def test_rejection_fine_tuning_is_fine_tuning_on_the_right_samples_alone(budget: int) -> None:
    """Wrong samples and unscored ones count neither above nor below the line."""
    right = [SAMPLES[0], SAMPLES[3]]
    for reduction, expected in {
        "token_mean": torch.cat([_nll(one) for one in right]).mean(),
        "sequence_mean": torch.stack([_nll(one).mean() for one in right]).mean(),
        "sequence_sum": torch.stack([_nll(one).sum() for one in right]).mean(),
    }.items():
        found = run(SFT(keep="correct", reduction=reduction), SAMPLES, budget)
        assert found.loss == pytest.approx(float(expected), rel=1e-6)
        assert not found.gradients["a", 1].any()
        assert not found.gradients["b", 0].any()
        assert found.metrics["objective/kept"].value == 0.5


def test_a_step_without_a_right_sample_teaches_nothing() -> None:
    found = run(SFT(keep="correct"), SAMPLES[1:3])
    assert found.loss == 0.0
    assert not any(gradient.any() for gradient in found.gradients.values())
    assert found.metrics["objective/kept"].value == 0.0


def test_by_default_everything_counts_and_no_reward_is_asked_for() -> None:
    found = run(SFT(), SAMPLES)
    assert found.loss == pytest.approx(float(torch.cat([_nll(one) for one in SAMPLES]).mean()), rel=1e-6)
    assert not SFT().needs.reward
    assert SFT(keep="correct").needs.reward


def test_an_unlikely_token_is_a_finite_loss() -> None:
    found = run(SFT(), [response("a", 0, 1.0, (0,), [[-300.0, 0.0, 0.0, 0.0]])])
    assert found.loss == pytest.approx(300 + math.log(3))
    assert torch.isfinite(found.gradients["a", 0]).all()
