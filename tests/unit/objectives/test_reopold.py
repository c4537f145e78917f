"""REOPOLD: the floor in its two readings, and which tokens count before and after the switch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.opd import OPD
from megatron_distill.objectives.reopold import REOPOLD
from megatron_distill.testing.world import Worlds
from megatron_distill.types import Batch, TokenStats
from tests.unit.objectives.judged import STUDENT, TEACHER, every_token, packed, run

REWARDS = [-1.5445373054, 0.9554626946, -1.0445373054, -1.5445373054]
"""log p - log q of the golden vector, by id."""
BATCH = packed([(1, 0, 2), (1, 1)])
STUDENTS, TEACHERS = STUDENT.expand(5, 4), TEACHER.expand(5, 4)


@pytest.mark.parametrize(
    ("mixture", "mixture_floor", "odds_floor"),
    [(0.1, -2.5584, -2.1972), (0.2, -2.0118, -1.3863), (0.3, -1.7200, -0.8473)],
)
def test_the_two_readings_of_the_floor(mixture: float, mixture_floor: float, odds_floor: float) -> None:
    assert REOPOLD(mixture=mixture).floor == pytest.approx(mixture_floor, abs=5e-5)
    assert REOPOLD(mixture=mixture, floor_form="odds").floor == pytest.approx(odds_floor, abs=5e-5)


@pytest.mark.parametrize("mixture", [0.1, 0.3, 0.7])
def test_only_the_first_reading_bounds_the_log_ratio_to_a_mixture(mixture: float) -> None:
    """log(lambda + (1-lambda) p/q) >= (1-lambda) max(log p/q, floor), whatever p/q is."""
    log_ratio = torch.linspace(-40, 10, 2001, dtype=torch.float64)
    bounded = torch.log(mixture + (1 - mixture) * log_ratio.exp())
    floor = REOPOLD(mixture=mixture).floor
    assert (bounded >= (1 - mixture) * log_ratio.clamp(min=floor) - 1e-12).all()
    if mixture < 0.5:
        odds = REOPOLD(mixture=mixture, floor_form="odds").floor
        assert (bounded < (1 - mixture) * log_ratio.clamp(min=odds) - 1e-3).any()


def _slopes(objective: REOPOLD, step: int = 0) -> list[float]:
    """-d loss / d log q(y) of each token: reward times weight, over the denominator."""
    found = run(objective, BATCH, STUDENTS, TEACHERS, step=step)
    target_R = BATCH.micro[0].target_R
    q_R = STUDENT.softmax(-1)[target_R]
    return (-found.gradient_RV[torch.arange(5), target_R] / (1 - q_R)).tolist()


def test_exploration_leaves_out_what_lies_below_the_floor_above_and_below_the_line() -> None:
    """A floor of -1.1932: id 0 is below it, id 2 above."""
    slopes = _slopes(REOPOLD(mixture=0.232655, floor_form="odds", switch_step=None))
    expected = [REWARDS[1], 0.0, REWARDS[2], REWARDS[1], REWARDS[1]]
    assert slopes == pytest.approx([one / 4 for one in expected], abs=1e-6)


@pytest.mark.parametrize("step", [0, 149, 150, 151])
def test_the_switch_comes_at_its_step(step: int) -> None:
    objective = REOPOLD(mixture=0.232655, floor_form="odds", entropy_share=1.0)
    slopes = _slopes(objective, step)
    assert (slopes[1] == 0.0) is (step < 150)
    never = _slopes(REOPOLD(mixture=0.232655, floor_form="odds", switch_step=None), step)
    assert never[1] == 0.0


def test_refinement_counts_low_rewards_at_the_floor() -> None:
    """Clipped, not left out: the mask is the entropy's."""
    objective = REOPOLD(mixture=0.232655, floor_form="odds", switch_step=0, entropy_share=1.0)
    expected = [REWARDS[1], objective.floor, REWARDS[2], REWARDS[1], REWARDS[1]]
    assert _slopes(objective) == pytest.approx([one / 5 for one in expected], abs=1e-6)


def _spread(batch: Batch) -> tuple[Tensor, ...]:
    """An entropy for each token that tells them all apart, the same under every cut."""
    return tuple((micro.index_S[micro.segment_R] * 37 % 11).double() + micro.target_R / 100.0 for micro in batch.micro)


def _kept(rank: int, size: int, share: float, group: object = None) -> list[tuple[int, int, float]]:
    """(sequence, id) that count on this rank, and the denominator."""
    tokens = [tuple(range(place, place + 1 + place % 4)) for place in range(11)]
    batch = packed(tokens, dp_rank=rank, dp_size=size, budget=12)
    zeros = tuple(torch.zeros(micro.rows, dtype=torch.float64) for micro in batch.micro)
    stats = TokenStats(student_logp=zeros, entropy=_spread(batch), teacher_logp={"teacher": zeros})
    objective = REOPOLD(switch_step=0, entropy_share=share)
    scope = Scope(seed=0, step=0, data_group=group)
    plan, _ = objective.prepare(stats, batch, scope, {})
    found = []
    for micro, weight_R in zip(batch.micro, plan.weights["reverse_kl"], strict=True):
        for row in weight_R.nonzero().flatten().tolist():
            sequence = int(micro.index_S[micro.segment_R[row]])
            found.append((sequence, int(micro.target_R[row]), plan.denominators["reverse_kl"]))
    return found


def _kept_on_ranks(share: float) -> list[tuple[int, int, float]]:
    distributed = torch.distributed
    return _kept(distributed.get_rank(), distributed.get_world_size(), share, distributed.group.WORLD)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_the_quantile_is_of_the_whole_steps_tokens_not_of_a_ranks(worlds: Worlds, share: float) -> None:
    whole = _kept(0, 1, share)
    ranks = worlds(2).run(_kept_on_ranks, share)
    assert sorted(ranks[0] + ranks[1]) == sorted(whole)
    count = sum(1 + place % 4 for place in range(11))
    assert len(whole) == round(share * count)
    assert {one[2] for one in whole} == {float(len(whole))}


def test_tokens_of_highest_entropy_are_kept() -> None:
    level, sharp = torch.zeros(4), torch.tensor([8.0, 0.0, 0.0, 0.0])
    students = torch.stack([sharp, level, sharp, level, sharp])
    found = run(REOPOLD(switch_step=0, entropy_share=0.4), BATCH, students, TEACHERS)
    assert (found.gradient_RV.abs().sum(-1) > 0).tolist() == [False, True, False, True, False]
    assert found.metrics["objective/kept"].value == pytest.approx(0.4)
    assert found.metrics["objective/entropy_threshold"].value == pytest.approx(math.log(4))


def test_a_step_that_is_all_below_the_floor_is_zero_and_not_nan() -> None:
    batch = packed([(0, 0)])
    found = run(REOPOLD(mixture=0.45, floor_form="odds"), batch, STUDENT.expand(2, 4), TEACHER.expand(2, 4))
    assert found.loss == 0.0
    assert not found.gradient_RV.any()
    assert found.metrics["objective/above_floor"].value == 0.0


def test_a_floor_that_binds_nowhere_leaves_on_policy_distillation() -> None:
    found = run(REOPOLD(mixture=0.1), BATCH, STUDENTS, TEACHERS)
    plain = run(OPD(), BATCH, STUDENTS, TEACHERS)
    assert found.loss == pytest.approx(plain.loss)
    torch.testing.assert_close(found.gradient_RV, plain.gradient_RV, rtol=1e-6, atol=1e-9)


def test_the_importance_ratio_corrects_for_who_sampled() -> None:
    """The reward is the current student's; with the ratio, samples of another policy teach the reverse KL exactly."""
    old = torch.tensor([0.3, 0.4, 0.2, 0.1], dtype=torch.float64)
    torch.testing.assert_close(every_token(REOPOLD(old_logprobs="rollout"), old), every_token(OPD()), rtol=0, atol=1e-6)


def test_needs_and_settings() -> None:
    assert REOPOLD().needs.entropy
    assert not REOPOLD(switch_step=None).needs.entropy
    for settings, message in (
        ({"mixture": 0.0}, "mixture=0.0: must be between 0 and 1.0"),
        ({"mixture": 0.5, "floor_form": "odds"}, "mixture=0.5: must be between 0 and 0.5 with floor_form=odds"),
        ({"support": "top_k"}, "support=top_k: reopold compares single log-probs"),
        ({"switch_step": -1}, "switch_step=-1: must be 0 or more"),
        ({"entropy_share": 0.0}, "entropy_share=0.0: must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            REOPOLD(**settings)
