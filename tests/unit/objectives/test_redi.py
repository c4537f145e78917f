"""REDI: numbers worked out by hand, and the ways in which it goes wrong."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_distill.errors import DataError
from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.redi import REDI
from megatron_distill.objectives.sft import SFT
from megatron_distill.testing.world import Worlds
from megatron_distill.types import TokenStats
from tests.unit.objectives.steps import CHOSEN, REJECTED, packed, response, run

PAIRS = [
    response("a", 0, 1.0, (3, 2)),
    response("a", 1, 0.0, (1, 0, 3)),
    response("b", 0, 1.0, (0, 1, 1, 2, 3)),
    response("b", 1, 0.0, (0, 1, 3)),
    response("c", 0, 1.0, (1,)),
    response("c", 1, 0.0, (2, 2, 2, 2)),
]


@pytest.mark.parametrize(("alpha", "loss"), [(0.8, 0.08597792659559039), (1.0, -0.025866725955217107)])
def test_a_pair_worked_out_by_hand(alpha: float, loss: float) -> None:
    found = run(REDI(alpha=alpha), [CHOSEN, REJECTED])
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.sums["loss/chosen"] == pytest.approx((0.44018969856119533 + 0.6265233750364457) / 2)


def test_the_gradient_pulls_the_chosen_and_pushes_the_rejected_token() -> None:
    gradients = run(REDI(), [CHOSEN, REJECTED]).gradients
    chosen = [0.11844140904495508, 0.043572159371016286, 0.016029301640042494, -0.17804287005601382]
    rejected = [-0.04663405454056251, 0.13990216362168756, -0.04663405454056251, -0.04663405454056251]
    assert gradients["a", 0][0].tolist() == pytest.approx(chosen)
    assert gradients["a", 1][0].tolist() == pytest.approx(rejected)


def test_alpha_zero_is_length_normalised_fine_tuning_on_the_chosen_responses() -> None:
    found = run(REDI(alpha=0.0), PAIRS)
    tuned = run(SFT(reduction="sequence_mean"), PAIRS[::2])
    assert found.loss == pytest.approx(tuned.loss)
    for name, gradient in tuned.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient)
    assert all(not found.gradients[one.group, 1].any() for one in PAIRS[1::2])


def test_alpha_one_is_symmetric() -> None:
    """Exchanging chosen and rejected changes the sign, and nothing else."""
    turned = [response(one.group, one.sample, 1.0 - (one.reward or 0.0), one.tokens) for one in PAIRS]
    turned = [
        type(one)(group=one.group, sample=one.sample, reward=one.reward, tokens=one.tokens, logits_RV=like.logits_RV)
        for one, like in zip(turned, PAIRS, strict=True)
    ]
    found, other = run(REDI(alpha=1.0), PAIRS), run(REDI(alpha=1.0), turned)
    assert found.loss == pytest.approx(-other.loss)
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(gradient, -other.gradients[name])


def test_lengths_are_those_of_whole_responses_however_the_step_is_cut() -> None:
    """Every token of a response weighs 1 over the length of all of it, and every pair counts once."""
    whole = run(REDI(), PAIRS)
    for budget in (1, 6, 9):
        cut = run(REDI(), PAIRS, budget)
        assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
        for name, gradient in whole.gradients.items():
            torch.testing.assert_close(cut.gradients[name], gradient, rtol=1e-6, atol=1e-9)
    for one in PAIRS:
        gradient = whole.gradients[one.group, one.sample]
        taken = torch.tensor(one.tokens)
        p_R = one.logits_RV.softmax(-1)[torch.arange(len(taken)), taken]
        slope = gradient[torch.arange(len(taken)), taken] / (1 - p_R)
        expected = (-1.0 if one.reward else 0.8) / len(taken) / 3
        assert slope.tolist() == pytest.approx([expected] * len(taken))


def _mixed(rank_world: tuple[int, int], objective: REDI) -> float:
    """Weights of one rank's share of the step, summed over ranks and signs."""
    rank, world = rank_world
    batch = packed(PAIRS, dp_rank=rank, dp_size=world)
    scope = Scope(seed=0, step=0, data_group=torch.distributed.group.WORLD)
    plan, _ = objective.prepare(TokenStats(), batch, scope, {})
    chosen = sum(float(one.sum()) for one in plan.weights["chosen"])
    rejected = sum(float(one.sum()) for one in plan.weights["rejected"])
    return float(scope.total(torch.tensor(chosen - 10 * rejected, dtype=torch.float64)))


def _on_ranks(objective: REDI) -> float:
    return _mixed((torch.distributed.get_rank(), torch.distributed.get_world_size()), objective)


@pytest.mark.parametrize("mask", [False, True])
def test_pairs_may_lie_on_two_ranks(worlds: Worlds, mask: bool) -> None:
    objective = REDI(mask_common_prefix=mask)
    shares = [packed(PAIRS, dp_rank=rank, dp_size=2) for rank in range(2)]
    groups = [{one.rollout.group for micro in share.micro for one in micro.sequences} for share in shares]
    assert groups[0] & groups[1], "no pair is cut: the test would prove nothing"
    # three pairs: each chosen response weighs 1, each rejected one alpha; with the mask, none but b's rejected is
    # shorter than its prefix and keeps a token still
    assert worlds(2).run(_on_ranks, objective) == [pytest.approx(3 - 10 * 3 * 0.8, rel=1e-6)] * 2


def test_a_shared_prefix_is_pushed_down_where_the_rejected_response_is_shorter_unless_it_is_masked() -> None:
    logits = torch.randn(5, 4).tolist()
    chosen = response("b", 0, 1.0, (0, 1, 1, 2, 3), logits)
    rejected = response("b", 1, 0.0, (0, 1, 3), logits[:3])
    found = run(REDI(), [chosen, rejected])
    net = found.gradients["b", 0][:2] + found.gradients["b", 1][:2]
    assert (net[torch.arange(2), torch.tensor([0, 1])] > 0).all(), "the loss falls as shared tokens get unlikelier"
    masked = run(REDI(mask_common_prefix=True), [chosen, rejected])
    for sample, length in ((0, 5), (1, 3)):
        gradient = masked.gradients["b", sample]
        assert not gradient[:2].any()
        assert gradient[2:].abs().sum(-1).all()
        taken = torch.tensor((chosen, rejected)[sample].tokens)[2:]
        p_R = torch.tensor(logits).double().softmax(-1)[torch.arange(2, length), taken]
        slope = gradient[torch.arange(2, length), taken] / (1 - p_R)
        expected = (-1.0, 0.8)[sample] / (length - 2)
        assert slope.tolist() == pytest.approx([expected] * (length - 2)), "lengths count what the mask leaves"


def test_responses_that_agree_again_further_on_are_masked_up_to_where_they_first_part() -> None:
    pair = [response("a", 0, 1.0, (0, 1, 2, 3, 1)), response("a", 1, 0.0, (0, 2, 2, 3))]
    gradients = run(REDI(mask_common_prefix=True), [*pair, *PAIRS[2:]]).gradients
    assert [bool(row.any()) for row in gradients["a", 0]] == [False, True, True, True, True]
    assert [bool(row.any()) for row in gradients["a", 1]] == [False, True, True, True]


def test_a_response_that_is_the_others_beginning_has_nothing_left_and_no_nan() -> None:
    found = run(REDI(mask_common_prefix=True), [response("a", 0, 1.0, (1, 2, 3)), response("a", 1, 0.0, (1, 2))])
    assert math.isfinite(found.loss)
    assert not found.gradients["a", 1].any()
    assert found.gradients["a", 0][2].any()


def test_the_push_on_a_wrong_token_does_not_fade_as_its_probability_does() -> None:
    """Why alpha stays below 1 and the learning rate low: the loss has no floor."""
    slopes = []
    for logit in (0.0, -10.0, -300.0):
        rejected = response("a", 1, 0.0, (0,), [[logit, 0.0, 0.0, 0.0]])
        found = run(REDI(), [CHOSEN, rejected])
        assert math.isfinite(found.loss)
        slopes.append(float(found.gradients["a", 1][0, 0]))
    assert slopes == sorted(slopes)
    assert slopes[-1] == pytest.approx(0.8)


def test_decay_weighs_the_rejected_term_by_its_likelihood_and_has_no_gradient_of_its_own() -> None:
    plain, decayed = run(REDI(), [CHOSEN, REJECTED]), run(REDI(rejected_decay=2.0), [CHOSEN, REJECTED])
    mean = (-0.7436683806286791 - 0.44018969856119533 - 0.49381170907222385) / 3
    factor = math.exp(2.0 * mean)
    torch.testing.assert_close(decayed.gradients["a", 1], plain.gradients["a", 1] * factor, rtol=1e-6, atol=1e-9)
    assert decayed.sums["loss/rejected"] == pytest.approx(plain.sums["loss/rejected"] * factor, rel=1e-6)
    torch.testing.assert_close(decayed.gradients["a", 0], plain.gradients["a", 0])


def test_monitoring_logs_mean_log_probs_and_accuracy_and_changes_nothing() -> None:
    plain, watched = run(REDI(), PAIRS, budget=6), run(REDI(monitor=True), PAIRS, budget=6)
    assert plain.metrics == {}
    assert watched.loss == plain.loss
    assert REDI().needs.student_logprobs == "none", "no second forward pass unless asked"
    means = {
        (one.group, one.sample): float(
            one.logits_RV.log_softmax(-1)[torch.arange(len(one.tokens)), torch.tensor(one.tokens)].mean()
        )
        for one in PAIRS
    }
    chosen = [means[group, 0] for group in "abc"]
    rejected = [means[group, 1] for group in "abc"]
    assert watched.metrics["objective/chosen"].value == pytest.approx(sum(chosen) / 3)
    assert watched.metrics["objective/rejected"].value == pytest.approx(sum(rejected) / 3)
    higher = sum(one > other for one, other in zip(chosen, rejected, strict=True))
    assert watched.metrics["objective/accuracy"].value == pytest.approx(higher / 3)


def test_what_is_no_pair_is_refused() -> None:
    for responses in ([CHOSEN], [CHOSEN, response("a", 1, 1.0, (1,))], [*PAIRS, response("a", 2, 0.0, (1,))]):
        with pytest.raises(DataError, match=r"one chosen response with reward 1 and one rejected"):
            run(REDI(), responses)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.5}, r"alpha=1\.5: must be from 0"),
        ({"alpha": -0.1}, r"alpha=-0\.1"),
        ({"rejected_decay": -1.0}, r"rejected_decay=-1\.0: must be 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REDI(**fields)
