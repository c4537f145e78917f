"""GKD: whom beta weights, where its loss jumps, and what is not its affair."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from megatron_distill.errors import ConfigError
from megatron_distill.objectives.gkd import GKD
from megatron_distill.objectives.opd import OPD
from megatron_distill.types import Fidelity, Origin
from tests.unit.objectives.supervised import Answer, answers, golden, run


@pytest.mark.parametrize(("beta", "loss"), [(0.1, 0.0514349723), (0.5, 0.1463211437), (0.9, 0.0582944254)])
def test_values_worked_out_by_hand(beta: float, loss: float) -> None:
    assert run(GKD(beta=beta), [golden()]).loss == pytest.approx(loss, rel=1e-7)


def test_beta_weights_the_teacher() -> None:
    """KDFlow's jsd_beta and DistiLLM's lam weight the student: they are 1 - beta."""
    (one,) = answers(1)
    turned = Answer(tokens=one.tokens, student_RV=one.teacher_RV, teacher_RV=one.student_RV)
    assert run(GKD(beta=0.9), [one]).loss == pytest.approx(run(GKD(beta=0.1), [turned]).loss)
    assert run(GKD(beta=0.9), [one]).loss != pytest.approx(run(GKD(beta=0.1), [one]).loss)


def test_the_loss_jumps_at_the_ends_by_one_over_beta() -> None:
    held = [golden()]
    forward, reverse = run(GKD(beta=0.0), held), run(GKD(beta=1.0), held)
    assert forward.loss == pytest.approx(0.5739102485)
    assert reverse.loss == pytest.approx(0.6783830802)
    near = 1e-4
    assert run(GKD(beta=near), held).loss / near == pytest.approx(forward.loss, rel=1e-2)
    assert run(GKD(beta=1 - near), held).loss / near == pytest.approx(reverse.loss, rel=1e-2)


def test_the_temperature_is_the_losss_own_and_has_no_square_in_front() -> None:
    found = run(GKD(temperature=2.0), [golden()])
    assert found.loss == pytest.approx(0.0417563123, rel=1e-7)
    assert run(GKD(temperature=2.0, beta=0.0), [golden()]).gradients[0][0].tolist() == pytest.approx(
        [0.0921377389, -0.1414692555, 0.0287728082, 0.0205587084], rel=1e-8
    )


def test_fixed_responses_are_judged_as_rollouts_are() -> None:
    """lambda, the share of rollouts, is the source's: the objective has no such setting."""
    (one,) = answers(5)
    fixed = Answer(tokens=one.tokens, student_RV=one.student_RV, teacher_RV=one.teacher_RV, origin=Origin.CONSTRUCTED)
    assert run(GKD(), [fixed]).loss == run(GKD(), [one]).loss
    assert not {"lambda", "lmbda", "on_policy_fraction"} & {field.name for field in fields(GKD)}


def test_the_denominator_is_the_steps_however_it_is_cut() -> None:
    held = answers(3, 1, 7, 2)
    whole, cut = run(GKD(), held), run(GKD(), held, budget=1)
    assert cut.loss == pytest.approx(whole.loss)
    for ours, theirs in zip(cut.gradients, whole.gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_beta_one_by_the_sampled_token_is_on_policy_distillation() -> None:
    held = answers(3, 5)
    found, like = run(GKD(beta=1.0, sampled_token=True), held), run(OPD(), held)
    assert found.loss == pytest.approx(like.loss)
    for ours, theirs in zip(found.gradients, like.gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_sampled_token_needs_samples_and_a_bounded_estimate() -> None:
    needs = GKD(sampled_token=True).needs
    assert (needs.teacher, needs.origins, needs.unfiltered_samples) == (Fidelity.TOKEN, {Origin.STUDENT}, True)
    with pytest.raises(ValueError, match="jsd of 0: has no estimate by the sampled token"):
        GKD(sampled_token=True, beta=0.0)
    (one,) = answers(3)
    fixed = Answer(tokens=one.tokens, student_RV=one.student_RV, teacher_RV=one.teacher_RV, origin=Origin.TEACHER)
    with pytest.raises(ConfigError, match="learns from student tokens, the batch holds teacher tokens"):
        run(GKD(sampled_token=True), [fixed])


def test_beta_out_of_range_is_refused() -> None:
    for beta in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"beta={beta}: must be between 0"):
            GKD(beta=beta)
