"""TAPO: two groups that never mix, token weights by hand, and the ways in which constructed trajectories go wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_distill.errors import ConfigError, DataError
from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.grpo import GRPO
from megatron_distill.objectives.tapo import TAPO
from megatron_distill.testing.world import Worlds
from megatron_distill.types import Fidelity
from tests.unit.objectives.trajectories import Name, group, run, trajectory

ORIGINALS = group("a", [1, 1, 0, 0, 0, 0, 0, 0], [3, 1, 4, 2, 5, 1, 2, 3], ratio=1.1)
REPAIRS = group("a/ref", [1, 1, 1, 0], [4, 2, 6, 3], origin="c")
PLAIN: dict[str, Any] = {"lowest_weight": 1.0, "highest_weight": 1.0}
"""Without token weights."""


@pytest.mark.parametrize(
    ("logits", "token", "weight"),
    [
        ([1.0, 0, -1, 2], 3, 1.6608794735477506),
        ([1.0, 0, -1, 2], 2, 0.08269031990030372),
        ([0.0, 0, 1, -1], 2, 1.7123776489615377),
        ([0.0, 0, 1, -1], 3, 0.23174511413025467),
        ([0.0, 0, 0, 0], 1, 1.0),
        ([300.0, 0, 0, 0], 0, 1.0),
        ([300.0, 0, 0, 0], 2, 0.01),
    ],
    ids=["likely", "unlikely", "likely 2", "unlikely 2", "uniform", "certain", "300 nats down"],
)
def test_token_weights_worked_out_by_hand(logits: list[float], token: int, weight: float) -> None:
    repairs = [trajectory("a/ref", sample, 1.0 - sample, [token], origin="c", logits=logits) for sample in range(2)]
    found = run(TAPO(), [*ORIGINALS, *repairs])
    assert found.planned("constructed")["a/ref", 0] == pytest.approx([weight], rel=1e-12)


def test_the_mean_token_weight_is_exp_of_the_difference_of_two_entropies() -> None:
    logits = torch.tensor([1.0, 0, -1, 2], dtype=torch.float64)
    q = logits.softmax(-1)
    repairs = [trajectory("a/ref", y, float(y % 2), [y], origin="c", logits=logits.tolist()) for y in range(4)]
    found = run(TAPO(), [*ORIGINALS, *repairs]).planned("constructed")
    mean = sum(q[y].item() * found["a/ref", y][0] for y in range(4))
    assert mean == pytest.approx(((-q * q.log()).sum() + (q * q).sum().log()).exp().item())
    assert mean > 1


def test_token_weights_are_constants_of_constructed_tokens_only() -> None:
    """A gradient through exp(log q + H) would not be a multiple of q - onehot."""
    found = run(TAPO(), [*ORIGINALS, *REPAIRS])
    weights, advantages = found.planned("constructed"), found.planned("advantage")
    for one in REPAIRS:
        q_RV = one.logits_RV.softmax(-1)
        for row, token in enumerate(one.tokens):
            expected = q_RV[row].clone()
            expected[token] -= 1
            expected *= advantages[one.name][row] * weights[one.name][row] / 15
            assert found.gradients[one.name][row].tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert all(weight == 1.0 for one in ORIGINALS for weight in found.planned("original")[one.name])
    assert not any(found.planned("constructed")[one.name][0] for one in ORIGINALS)


@pytest.mark.parametrize("normalise", ["own", "joint"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("old_logprobs", ["rollout", "recompute"])
def test_without_an_eligible_query_it_is_grpo_bit_for_bit(normalise: Any, reduction: Any, old_logprobs: Any) -> None:
    common: dict[str, Any] = {"reduction": reduction, "old_logprobs": old_logprobs, "max_length": 9, "kl_weight": 0.1}
    rollouts = [*ORIGINALS, *group("b", [1, 1], [2, 5])]
    found = run(TAPO(normalise=normalise, **common), rollouts, budget=11)
    expected = run(GRPO(**common), rollouts, budget=11)
    assert found.loss == expected.loss
    for name, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[name], gradient)
    assert found.metrics["tapo/constructed"].value == 0
    assert found.metrics["tapo/weight_min"].count == 0


def test_repairs_leave_the_advantages_and_gradients_of_rollouts_alone() -> None:
    found, alone = run(TAPO(), [*ORIGINALS, *REPAIRS]), run(TAPO(), ORIGINALS)
    assert found.planned("advantage")["a", 0][0] == pytest.approx(1.6201817, abs=1e-7)
    assert found.planned("advantage")["a", 7][0] == pytest.approx(-0.5400606, abs=1e-7)
    for one in ORIGINALS:
        assert found.planned("advantage")[one.name] == alone.planned("advantage")[one.name]
        assert torch.equal(found.gradients[one.name], alone.gradients[one.name])
    pooled = run(GRPO(), group("a", [1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0])).planned("advantage")
    assert [pooled["a", 0][0], pooled["a", 7][0]] == pytest.approx([1.1328, -0.8092], abs=1e-4)


def test_repairs_are_compared_with_repairs_of_the_same_query() -> None:
    found = run(TAPO(), [*ORIGINALS, *REPAIRS, *group("b/ref", [0, 0], origin="c")]).planned("advantage")
    assert [found["a/ref", sample][0] for sample in range(4)] == pytest.approx([0.5, 0.5, 0.5, -1.5], abs=1e-5)
    assert found["b/ref", 0] == [0.0, 0.0]


def test_all_repairs_of_the_step_can_be_one_group() -> None:
    objective = TAPO(reference_scope="batch")
    found = run(objective, [*ORIGINALS, *group("a/ref", [1, 1], origin="c"), *group("b/ref", [0], origin="c")])
    advantages = found.planned("advantage")
    assert [advantages[one][0] for one in (("a/ref", 0), ("a/ref", 1), ("b/ref", 0))] == pytest.approx(
        [0.5773493, 0.5773493, -1.1546985], abs=1e-5
    )
    assert advantages["a", 0][0] == pytest.approx(1.6201817, abs=1e-7)
    assert found.metrics["tapo/uniform_references"].count == 1


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_repairs_of_one_verdict_have_no_gradient_which_is_counted(reward: float) -> None:
    found = run(TAPO(), [*ORIGINALS, *group("a/ref", [reward] * 3, origin="c"), *group("b/ref", [1, 0], origin="c")])
    assert not any(found.gradients["a/ref", sample].any() for sample in range(3))
    assert found.metrics["tapo/uniform_references"].value == 0.5
    assert found.metrics["tapo/constructed"].value == 5
    assert found.metrics["tapo/constructed_reward"].value == pytest.approx((3 * reward + 1) / 5)


@pytest.mark.parametrize(("rule", "advantage"), [("zero", 0.0), ("reward", 1.0)])
@pytest.mark.parametrize("drop", [True, False])
def test_a_lone_repair_has_nothing_to_be_compared_with(rule: Any, advantage: float, drop: bool) -> None:
    objective = TAPO(lone_reference=rule, drop_uniform_groups=drop, **PLAIN)
    found = run(objective, [*ORIGINALS, trajectory("a/ref", 0, 1.0, 2, origin="c")])
    assert found.planned("advantage")["a/ref", 0] == [advantage] * 2
    assert found.pulls["a/ref", 0] == pytest.approx([advantage / 2] * 2)


def test_repairs_do_not_decide_which_rollouts_are_dropped() -> None:
    uniform = group("a", [0, 0, 0], 2)
    found = run(TAPO(drop_uniform_groups=True), [*uniform, *group("b", [1, 0]), *group("a/ref", [1, 0], origin="c")])
    assert found.planned("original")["a", 0] == [0.0, 0.0]
    assert found.plan.denominators["original"] == 4.0
    assert found.planned("constructed")["a/ref", 0] != [0.0, 0.0]


def test_either_term_is_a_mean_over_its_own_tokens_unless_they_are_joined() -> None:
    own, joint = (run(TAPO(normalise=how, **PLAIN), [*ORIGINALS, *REPAIRS]) for how in ("own", "joint"))
    assert own.plan.denominators == {"original": 21.0, "constructed": 15.0}
    assert joint.plan.denominators == {"original": 36.0, "constructed": 36.0}
    assert own.pulls["a/ref", 3] == pytest.approx([-1.5 / 15] * 3, abs=1e-6)
    assert joint.pulls["a/ref", 3] == pytest.approx([-1.5 / 36] * 3, abs=1e-6)


def test_constructed_weight_scales_one_term_only() -> None:
    one, half = (run(TAPO(constructed_weight=weight), [*ORIGINALS, *REPAIRS]) for weight in (1.0, 0.5))
    assert half.sums["loss/original"] == one.sums["loss/original"]
    assert half.sums["loss/constructed"] == pytest.approx(0.5 * one.sums["loss/constructed"])
    assert half.pulls["a/ref", 0] == pytest.approx([0.5 * pull for pull in one.pulls["a/ref", 0]])


def test_log_probs_of_repairs_are_never_the_engines() -> None:
    """The engine wrote them under another prompt, or has none at all."""
    found = run(TAPO(old_logprobs="rollout", **PLAIN), [*ORIGINALS, *REPAIRS])
    assert all(torch.isnan(one.rollout_logp_R).any() for one in found.batch.micro)
    assert found.pulls["a/ref", 3] == pytest.approx([-1.5 / 15] * 3, abs=1e-6)
    assert found.pulls["a", 7] == pytest.approx([-0.5400606 * 1.1 / 21] * 3, rel=1e-5)


def test_rollouts_without_the_engines_log_probs_are_refused_where_they_are_read() -> None:
    bare = group("a", [1, 0], ratio=None)
    with pytest.raises(DataError, match="old_logprobs=rollout: the step holds tokens of the student without"):
        run(TAPO(old_logprobs="rollout"), [*bare, *REPAIRS])
    assert math.isfinite(run(TAPO(), [*bare, *REPAIRS]).loss)


def test_the_copied_error_is_learned_unless_it_is_masked() -> None:
    repairs = [trajectory("a/ref", sample, 1.0 - sample, 5, origin="c", prefix_tokens=2 + sample) for sample in (0, 1)]
    plain = run(TAPO(**PLAIN), [*ORIGINALS, *repairs])
    assert plain.pulls["a/ref", 0] == pytest.approx([0.7071058 / 10] * 5, rel=1e-5)
    masked = run(TAPO(mask_prefix=True, **PLAIN), [*ORIGINALS, *repairs])
    assert masked.pulls["a/ref", 0] == pytest.approx([0.0] * 2 + [0.7071058 / 5] * 3, rel=1e-5)
    assert masked.pulls["a/ref", 1] == pytest.approx([0.0] * 3 + [-0.7071058 / 5] * 2, rel=1e-5)
    with pytest.raises(DataError, match="has no fact prefix_tokens"):
        run(TAPO(mask_prefix=True), [*ORIGINALS, *REPAIRS])


def test_the_reference_holds_rollouts_only() -> None:
    found, free = (run(TAPO(kl_weight=weight), [*ORIGINALS, *REPAIRS]) for weight in (0.1, 0.0))
    assert torch.equal(found.gradients["a/ref", 0], free.gradients["a/ref", 0])
    assert not torch.equal(found.gradients["a", 0], free.gradients["a", 0])


STEP = [*ORIGINALS, *REPAIRS, *group("b", [0, 1, 0], [4, 3, 1]), *group("b/ref", [1, 0], [7, 6], origin="c")]


def _found(fields: dict[str, Any]) -> tuple[dict[Name, list[float]], dict[str, float]]:
    scope = Scope(seed=0, step=0, data_group=dist.group.WORLD)
    found = run(TAPO(**fields), STEP, scope=scope, dp_rank=dist.get_rank(), dp_size=2)
    assert {"a", "a/ref"} <= {name[0] for name in found.pulls}
    return dict(found.pulls), {name: metric.value for name, metric in found.metrics.items()}


@pytest.mark.parametrize("fields", [{}, {"reference_scope": "batch", "normalise": "joint"}])
def test_both_groups_of_a_query_may_lie_on_two_ranks(worlds: Worlds, fields: dict[str, Any]) -> None:
    (first, metrics), (second, same) = worlds(2).run(_found, fields)
    whole = run(TAPO(**fields), STEP)
    assert metrics == same == pytest.approx({name: metric.value for name, metric in whole.metrics.items()})
    assert len(first) + len(second) == len(STEP)
    for name, pulls in {**first, **second}.items():
        assert pulls == pytest.approx(whole.pulls[name], rel=1e-9)


def test_a_teachers_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="learns from constructed and student tokens, the batch holds teacher tokens"):
        run(TAPO(), [*ORIGINALS, *group("a/ref", [1, 0], origin="t")])


def test_needs() -> None:
    needs = TAPO(old_logprobs="rollout").needs
    assert needs.student_logprobs == "recompute"
    assert needs.entropy
    assert needs.teacher is None
    assert TAPO(kl_weight=0.1).needs.teacher == Fidelity.TOKEN


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"constructed_weight": -1.0}, "constructed_weight=-1.0: must be 0 or more"),
        ({"lowest_weight": 0.0}, "lowest_weight=0.0: must be above 0"),
        ({"lowest_weight": 11.0}, "lowest_weight=11.0: must be above 0, up to highest_weight=10.0"),
        ({"clip_low": 0.0}, "clip_low=0.0"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TAPO(**fields)
