"""GRPO and its variants: the specification's numbers, and the ways in which group-relative training goes wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_distill.errors import ConfigError, DataError
from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.grpo import GRPO
from megatron_distill.testing.world import Worlds
from megatron_distill.types import Fidelity, Stop, TokenStats
from tests.unit.objectives.trajectories import Name, group, packed, run, trajectory


def _advantages(objective: GRPO, rewards: list[float], tokens: int | list[int] = 2, **common: Any) -> list[float]:
    found = run(objective, group("a", rewards, tokens, **common)).planned("advantage")
    return [found["a", sample][0] for sample in range(len(rewards))]


@pytest.mark.parametrize(
    ("right", "of", "advantages"),
    [
        (2, 8, (1.6201816746, -0.5400605582)),
        (3, 8, (1.2076124, -0.7245674)),
        (4, 8, (0.9354126, -0.9354126)),
        (3, 4, (0.4999990, -1.4999970)),
        (2, 4, (0.8660239, -0.8660239)),
        (1, 2, (0.7071058, -0.7071058)),
    ],
)
def test_advantages_divide_by_the_sample_standard_deviation(
    right: int, of: int, advantages: tuple[float, float]
) -> None:
    found = _advantages(GRPO(), [1.0] * right + [0.0] * (of - right))
    assert found == pytest.approx([advantages[0]] * right + [advantages[1]] * (of - right), abs=1e-7)


@pytest.mark.parametrize("rewards", [[1.0] * 4, [0.0] * 4, [0.1] * 3, [1.0]])
def test_groups_without_a_difference_teach_nothing_and_are_finite(rewards: list[float]) -> None:
    found = run(GRPO(), group("a", rewards))
    assert found.planned("advantage") == {("a", sample): [0.0, 0.0] for sample in range(len(rewards))}
    assert not any(gradient.any() for gradient in found.gradients.values())
    assert found.metrics["advantage/uniform_groups"].value == 1.0


def test_without_the_standard_deviation_advantages_are_differences() -> None:
    assert _advantages(GRPO(divide_by_std=False), [1, 0, 0, 0]) == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_leave_one_out_compares_with_the_others() -> None:
    objective = GRPO(divide_by_std=False, baseline="leave_one_out")
    assert _advantages(objective, [1, 0, 0.5]) == pytest.approx([1 - 0.25, 0 - 0.75, 0.5 - 0.5])


LENGTHS = [3, 10, 5, 2]


@pytest.mark.parametrize(
    ("fields", "pulls"),
    [
        ({"reduction": "sequence_mean"}, [0.125, -0.0125, -0.025, -0.0625]),
        ({"reduction": "token_mean"}, [0.075, -0.025, -0.025, -0.025]),
        ({"reduction": "constant", "max_length": 16}, [0.0234375, -0.0078125, -0.0078125, -0.0078125]),
    ],
)
def test_only_a_mean_per_sequence_makes_long_wrong_answers_cheap(fields: dict[str, Any], pulls: list[float]) -> None:
    found = run(GRPO(**fields), group("a", [1, 0, 0, 0], LENGTHS), budget=12)
    assert len(found.batch.micro) > 1
    for sample, (length, pull) in enumerate(zip(LENGTHS, pulls, strict=True)):
        assert found.pulls["a", sample] == pytest.approx([pull] * length, rel=1e-5)


def test_clip_higher_lets_unlikely_tokens_rise_further() -> None:
    def pull(**fields: float) -> float:
        return run(GRPO(**fields), group("a", [1, 0], 1, ratio=1.25)).pulls["a", 0][0]

    assert pull() == 0.0
    assert pull(clip_high=0.28) == pytest.approx(1.25 * 0.7071058 / 2, rel=1e-5)


def test_dual_clip_bounds_what_one_token_of_negative_advantage_can_do() -> None:
    def pull(**fields: float) -> float:
        return run(GRPO(**fields), group("a", [1, 0], 1, ratio=20.0)).pulls["a", 1][0]

    assert pull() == pytest.approx(-20 * 0.7071058 / 2, rel=1e-5)
    assert pull(dual_clip=10.0) == 0.0


def test_recomputed_log_probs_make_the_ratio_one_whatever_the_engine_said() -> None:
    drifted = group("a", [1, 0], 1, ratio=3.0)
    found = run(GRPO(old_logprobs="recompute"), drifted)
    assert found.pulls["a", 0] == pytest.approx([0.7071058 / 2], rel=1e-5)
    assert run(GRPO(), drifted).pulls["a", 0] == [0.0]


@pytest.mark.parametrize(
    "fields",
    [{}, {"reduction": "token_mean"}, {"reduction": "constant", "max_length": 9}],
    ids=["sequence_mean", "token_mean", "constant"],
)
def test_dropped_groups_are_not_counted(fields: dict[str, Any]) -> None:
    mixed, uniform = group("b", [1, 0, 0], [3, 1, 4]), group("a", [1, 1, 1], [2, 7, 1])
    found = run(GRPO(drop_uniform_groups=True, **fields), [*uniform, *mixed], budget=8)
    alone = run(GRPO(**fields), mixed)
    assert found.loss == pytest.approx(alone.loss)
    for name, pulls in alone.pulls.items():
        assert found.pulls[name] == pytest.approx(pulls)
    assert run(GRPO(**fields), [*uniform, *mixed]).pulls["b", 0] != pytest.approx(alone.pulls["b", 0])


def test_groups_are_dropped_for_what_the_verifier_said_not_for_how_long_they_are() -> None:
    objective = GRPO(drop_uniform_groups=True, max_length=8, overlong_buffer=4)
    responses = [*group("a", [1, 1], [2, 8]), *group("b", [1, 0])]
    assert run(objective, responses).pulls["a", 0] == [0.0, 0.0]
    assert run(GRPO(max_length=8, overlong_buffer=4), responses).pulls["a", 0] != [0.0, 0.0]


def test_a_step_of_nothing_but_dropped_groups_is_finite() -> None:
    found = run(GRPO(drop_uniform_groups=True, mask_truncated=True), group("a", [1, 1], stop=Stop.LENGTH))
    assert found.loss == 0.0
    assert not any(gradient.any() for gradient in found.gradients.values())


def test_overlong_answers_lose_reward_over_the_buffer_and_no_more_than_the_penalty() -> None:
    objective = GRPO(max_length=20480, overlong_buffer=4096, divide_by_std=False)
    batch = packed(group("a", [1.0] * 5, [16384, 18432, 20480, 20481, 10]))
    stats = TokenStats(student_logp=(torch.zeros(batch.counts.tokens),))
    plan, _ = objective.prepare(stats, batch, Scope(seed=0, step=0), {})
    (micro,), (advantage_R,) = batch.micro, plan.weights["advantage"]
    shaped = [advantage_R[micro.segment_R == place][0].item() for place in range(5)]
    assert [one - shaped[0] for one in shaped] == pytest.approx([0.0, -0.5, -1.0, -1.0, 0.0], abs=1e-6)


def test_truncated_answers_can_be_left_out_but_still_count_in_their_group() -> None:
    cut_off = [trajectory("a", 2, 0.0, 4, stop=Stop.LENGTH), trajectory("a", 3, 0.0, 4, stop=Stop.ABORTED)]
    responses = [*group("a", [1, 0], 3), *cut_off]
    found = run(GRPO(mask_truncated=True, reduction="token_mean"), responses)
    assert found.planned("advantage")["a", 0][0] == pytest.approx(1.5, rel=1e-5)
    assert found.pulls["a", 0] == pytest.approx([1.5 / 6] * 3, rel=1e-5)
    assert found.pulls["a", 2] == found.pulls["a", 3] == [0.0] * 4
    assert run(GRPO(reduction="token_mean"), responses).pulls["a", 0] == pytest.approx([1.5 / 14] * 3, rel=1e-5)


def _pulls(fields: dict[str, Any]) -> dict[Name, list[float]]:
    scope = Scope(seed=0, step=0, data_group=dist.group.WORLD)
    found = run(GRPO(**fields), STRADDLING, scope=scope, dp_rank=dist.get_rank(), dp_size=2)
    assert {name[0] for name in found.pulls} == {"a", "b"}
    return dict(found.pulls)


STRADDLING = [*group("a", [1, 0, 0, 1], [5, 3, 4, 2], ratio=1.1), *group("b", [0, 1, 0], [4, 3, 1])]


@pytest.mark.parametrize("fields", [{}, {"reduction": "token_mean", "drop_uniform_groups": True}])
def test_a_group_may_lie_on_two_ranks(worlds: Worlds, fields: dict[str, Any]) -> None:
    """A group's mean over one rank's share of it would be another mean."""
    shares = worlds(2).run(_pulls, fields)
    assert len(shares[0]) + len(shares[1]) == len(STRADDLING)
    whole = run(GRPO(**fields), STRADDLING)
    for name, pulls in {**shares[0], **shares[1]}.items():
        assert pulls == pytest.approx(whole.pulls[name], rel=1e-9)


def test_the_kl_is_k3_of_the_reference_and_pulls_the_student_to_it() -> None:
    [one, other] = group("a", [1, 1], 3)
    found = run(GRPO(kl_weight=0.1), [one, other])
    d_R = [
        (row.log_softmax(-1) - reference.log_softmax(-1))[token].item()
        for row, reference, token in zip(one.logits_RV, one.reference_RV, one.tokens, strict=True)
    ]
    assert found.pulls["a", 0] == pytest.approx([-0.1 * (1 - math.exp(-d)) / 6 for d in d_R])
    assert found.sums["loss/kl"] > 0
    same = [trajectory("a", sample, 1.0, 3, logits=[0.5, 1, -1, 0], reference=[0.5, 1, -1, 0]) for sample in range(2)]
    assert run(GRPO(kl_weight=0.1), same).sums["loss/kl"] == pytest.approx(0.0, abs=1e-12)


def test_the_temperature_is_that_of_the_ratio() -> None:
    """The engine's log-probs are those of its sampling temperature: at that temperature nothing has moved yet."""
    rollouts = group("a", [1, 0])
    assert run(GRPO(temperature=0.7), rollouts).pulls["a", 0] == pytest.approx([0.7071058 / 4] * 2, rel=1e-5)


def test_constants_of_the_plan_carry_no_gradient() -> None:
    plan = run(GRPO(old_logprobs="recompute", kl_weight=0.1), group("a", [1, 0])).plan
    assert not any(one.requires_grad for values in plan.weights.values() for one in values)


def test_rollouts_without_the_engines_log_probs_are_refused_where_they_are_read() -> None:
    rollouts = group("a", [1, 0], ratio=None)
    with pytest.raises(DataError, match="old_logprobs=rollout: the step holds tokens of the student without"):
        run(GRPO(), rollouts)
    assert math.isfinite(run(GRPO(old_logprobs="recompute"), rollouts).loss)


def test_a_rollout_without_a_verdict_is_left_out_above_and_below_the_line() -> None:
    """A check that took too long must not end a run."""
    scored, one_more = group("a", [1, 0]), [*group("a", [1, 0]), trajectory("a", 2, None, 2)]
    for reduction in ("token_mean", "sequence_mean"):
        alone, beside = (run(GRPO(reduction=reduction), rollouts) for rollouts in (scored, one_more))
        assert beside.loss == pytest.approx(alone.loss)
        assert beside.pulls["a", 0] == pytest.approx(alone.pulls["a", 0])
        assert beside.pulls["a", 2] == [0.0] * len(beside.pulls["a", 2])


def test_a_step_without_any_verdict_is_refused() -> None:
    with pytest.raises(DataError, match="no rollout of the step has a reward"):
        run(GRPO(), [trajectory("a", sample, None, 2) for sample in range(2)])


def test_a_kl_of_no_weight_is_no_term() -> None:
    assert set(run(GRPO(), group("a", [1, 0])).plan.denominators) == {"policy"}


def test_tokens_that_the_student_did_not_sample_are_refused() -> None:
    with pytest.raises(ConfigError, match="learns from student tokens, the batch holds constructed tokens"):
        run(GRPO(), group("a", [1, 0], origin="c"))


def test_needs_follow_from_the_settings() -> None:
    assert GRPO().needs.teacher is None
    assert GRPO().needs.student_logprobs == "rollout"
    assert GRPO(old_logprobs="recompute").needs.student_logprobs == "recompute"
    assert GRPO().needs.reward
    assert GRPO().needs.group
    assert GRPO().needs.unfiltered_samples
    held = GRPO(kl_weight=0.01).needs
    assert (held.teacher, held.teacher_names) == (Fidelity.TOKEN, {"reference"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_low": 0.0}, "clip_low=0.0: must be above 0"),
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"clip_high": -0.1}, "clip_high=-0.1: must be above 0"),
        ({"dual_clip": 1.0}, "dual_clip=1.0: must be above 1"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0: must be 0 or more"),
        ({"reduction": "constant"}, "max_length: needed by reduction=constant"),
        ({"overlong_buffer": 4}, "max_length: needed"),
        ({"overlong_buffer": 9, "max_length": 8}, "overlong_buffer=9: must be from 0 to max_length=8"),
        ({"overlong_penalty": 0.0}, "overlong_penalty=0.0"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPO(**fields)
