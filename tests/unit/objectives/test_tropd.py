"""TrOPD: who is trusted, what outliers teach instead, and what the teacher's own tokens do."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_distill.errors import ConfigError
from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.opd import OPD
from megatron_distill.objectives.sft import SFT
from megatron_distill.objectives.tropd import TrOPD
from megatron_distill.types import Batch, Fidelity, Origin, Plan, TokenStats
from tests.oracles import dense
from tests.unit.objectives.judged import STUDENT, TEACHER, packed, run

TRUST = [0.2134105923, 1.0, 0.3518545829, 0.2134105923]
TOTAL_VARIATION = 0.5163070416
"""Of the golden vector."""


def _plan(objective: TrOPD, batch: Batch, *, seed: int = 0, step: int = 0, teacher: torch.Tensor = TEACHER) -> Plan:
    """Every token from the golden student, judged by the golden teacher."""
    targets = [micro.target_R for micro in batch.micro]
    stats = TokenStats(
        student_logp=tuple(STUDENT.log_softmax(-1)[target_R] for target_R in targets),
        teacher_logp={"teacher": tuple(teacher.log_softmax(-1)[target_R] for target_R in targets)},
    )
    return objective.prepare(stats, batch, Scope(seed=seed, step=step), {})[0]


def _trusted(plan: Plan, batch: Batch) -> dict[str, list[bool]]:
    """By response, which of its tokens are trusted."""
    found = {}
    for micro, weight_R in zip(batch.micro, plan.weights["trust"], strict=True):
        for place, one in enumerate(micro.sequences):
            found[one.rollout.group] = (weight_R[micro.segment_R == place] > 0).tolist()
    return found


def _samples(responses: int, length: int) -> list[list[int]]:
    """Responses of the golden student."""
    drawn = STUDENT.softmax(-1).multinomial(responses * length, replacement=True, generator=_generator())
    return drawn.view(responses, length).tolist()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_outliers_are_as_frequent_as_student_and_teacher_differ() -> None:
    """E[1 - M] over the student's samples is the total variation; each token's M has its own probability."""
    batch = packed(_samples(100, 400))
    plan = _plan(TrOPD(), batch)
    target_R, trusted_R = batch.micro[0].target_R, plan.weights["trust"][0] > 0
    count = len(target_R)
    sigma = math.sqrt(TOTAL_VARIATION * (1 - TOTAL_VARIATION) / count)
    assert abs(1 - trusted_R.double().mean().item() - TOTAL_VARIATION) < 5 * sigma
    for token, probability in enumerate(TRUST):
        mine = trusted_R[target_R == token].double()
        sigma = math.sqrt(probability * (1 - probability) / len(mine))
        assert abs(mine.mean().item() - probability) <= 5 * sigma
    metrics = {metric.name: metric for metric in plan.metrics}
    assert metrics["objective/trusted"].value == trusted_R.double().mean().item()
    assert metrics["objective/trusted"].count == count
    assert 1 - metrics["objective/trust_probability"].value == pytest.approx(TOTAL_VARIATION, abs=0.02)


def test_a_token_that_the_teacher_likes_as_much_is_trusted_for_certain() -> None:
    batch = packed([(1,) * 500])
    for seed in range(20):
        assert all(_trusted(_plan(TrOPD(), batch, seed=seed), batch)["000000"])
    batch = packed(_samples(10, 50))
    same = _plan(TrOPD(), batch, teacher=STUDENT)
    assert all(all(one) for one in _trusted(same, batch).values())
    assert not same.weights["outlier"][0].any()


def test_trust_is_the_same_however_the_step_is_cut_and_another_in_another_step() -> None:
    tokens = _samples(7, 40)
    whole = packed(tokens)
    expected = _trusted(_plan(TrOPD(), whole), whole)
    found: dict[str, list[bool]] = {}
    for rank in range(3):
        share = packed(tokens, budget=90, dp_rank=rank, dp_size=3, multiple=8)
        found |= _trusted(_plan(TrOPD(), share), share)
    assert found == expected
    assert _trusted(_plan(TrOPD(), whole), whole) == expected
    assert _trusted(_plan(TrOPD(), whole, step=1), whole) != expected
    assert _trusted(_plan(TrOPD(), whole, seed=1), whole) != expected
    assert len({tuple(one) for one in expected.values()}) == len(tokens)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_every_token_has_one_part_and_all_parts_one_denominator(reduction: str) -> None:
    origins = [(Origin.TEACHER,) * 2 + (Origin.STUDENT,) * 38, (Origin.STUDENT,) * 40]
    batch = packed(_samples(2, 40), origins=origins)
    objective = TrOPD(guidance=0.25, reduction=reduction)
    plan = _plan(objective, batch)
    parts = torch.stack([plan.weights["trust"][0], plan.weights["outlier"][0], plan.weights["guidance"][0] / 0.25])
    assert ((parts > 0).sum(0) == 1).all()
    assert (parts[2] > 0).tolist() == [True] * 2 + [False] * 78
    (denominator,) = set(plan.denominators.values())
    assert denominator == (80.0 if reduction == "token_mean" else 2.0)
    share = 1 / 40 if reduction == "sequence_mean" else 1.0
    assert parts.sum(0).tolist() == pytest.approx([share] * 80)
    masked = _plan(TrOPD(outlier="mask"), batch)
    assert set(masked.denominators.values()) == {80.0}, "what is masked still counts below the line"


def _rows(outlier: str, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of 200 tokens of id 0, of which the teacher wants less, times 200; which of them are trusted."""
    batch = packed([(0,) * 200])
    objective = TrOPD(outlier=outlier, top_k=2, **settings)
    found = run(objective, batch, STUDENT.expand(200, 4), TEACHER.expand(200, 4))
    return 200 * found.gradient_RV, found.plan.weights["trust"][0] > 0


def _policy(advantage: float) -> list[float]:
    """-A grad log q(y = 0)."""
    q = STUDENT.softmax(-1)
    return (advantage * (q - torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))).tolist()


@pytest.mark.parametrize(
    ("outlier", "settings", "expected"),
    [
        ("forward_kl", {}, [0.3932875921, -0.5316121992, 0.1130906682, 0.0252339389]),
        ("forward_kl", {"outside": "tail"}, [0.4185215310, -0.5163070416, 0.0799469376, 0.0178385730]),
        ("forward_kl", {"outside": "renormalise"}, [0.5032564092, -0.5032564092, 0.0, 0.0]),
        ("forward_kl", {"support": "full"}, [0.4185215310, -0.5163070416, 0.0769485505, 0.0208369601]),
        ("mask", {}, [0.0] * 4),
        ("clip", {}, _policy(-1.0)),
        ("clip", {"clip_floor": -0.5}, _policy(-0.5)),
        ("clip", {"clip_floor": -9.0}, _policy(-1.5445373054)),
    ],
)
def test_what_an_outlier_teaches(outlier: str, settings: dict[str, object], expected: list[float]) -> None:
    gradient_RV, trusted_R = _rows(outlier, **settings)
    assert 20 < trusted_R.sum() < 70
    for mine, wanted in ((~trusted_R, expected), (trusted_R, _policy(-1.5445373054))):
        torch.testing.assert_close(
            gradient_RV[mine], torch.tensor([wanted] * int(mine.sum()), dtype=torch.float64), rtol=0, atol=1e-8
        )


def test_trusted_tokens_push_no_harder_than_1_over_e_in_expectation() -> None:
    """Why the clip has its floor at -1: there min(1, r) |log r| is largest."""
    log_ratio = torch.linspace(-30, 0, 3001, dtype=torch.float64)
    push = log_ratio.exp() * log_ratio.abs()
    assert push.max().item() == pytest.approx(1 / math.e, abs=1e-6)
    assert log_ratio[push.argmax()].item() == pytest.approx(TrOPD().clip_floor, abs=0.01)


def test_the_teachers_own_tokens_are_fine_tuned_on_with_weight_beta_and_teach_nothing_else() -> None:
    origins = [(Origin.TEACHER,) * 3 + (Origin.STUDENT,) * 2]
    batch = packed([(1, 0, 3, 2, 0)], origins=origins)
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    found = run(TrOPD(guidance=0.25, top_k=2), batch, student, teacher)
    tuned = run(SFT(), batch, student, teacher)
    torch.testing.assert_close(found.gradient_RV[:3], 0.25 * tuned.gradient_RV[:3])
    other = run(TrOPD(guidance=0.25, top_k=2), batch, student, teacher - teacher.flip(1))
    torch.testing.assert_close(found.gradient_RV[:3], other.gradient_RV[:3])
    assert run(TrOPD(guidance=0.0, top_k=2), batch, student, teacher).gradient_RV[:3].abs().max() == 0.0
    assert found.metrics["objective/trusted"].count == 2


def test_without_outliers_it_is_on_policy_distillation() -> None:
    """Where the teacher likes every sampled token at least as much."""
    batch = packed([(1, 1), (1,)])
    found = run(TrOPD(top_k=2), batch, STUDENT.expand(3, 4), TEACHER.expand(3, 4))
    plain = run(OPD(), batch, STUDENT.expand(3, 4), TEACHER.expand(3, 4))
    assert found.loss == pytest.approx(plain.loss)
    torch.testing.assert_close(found.gradient_RV, plain.gradient_RV)


def test_with_the_engines_log_probs_trust_and_advantage_are_of_who_sampled() -> None:
    """The engine gave id 0 less than the teacher does: certain trust, though the student now gives it more."""
    logp = math.log(0.1)
    batch = packed([(0,) * 50], logprobs=[(logp,) * 50])
    found = run(TrOPD(old_logprobs="rollout", top_k=2), batch, STUDENT.expand(50, 4), TEACHER.expand(50, 4))
    assert found.metrics["objective/trusted"].value == 1.0
    q, p = STUDENT.softmax(-1)[0].item(), TEACHER.softmax(-1)[0].item()
    assert found.loss == pytest.approx(-q / 0.1 * math.log(p / 0.1), rel=1e-6)


def test_engines_that_know_nothing_of_the_teachers_tokens_do_no_harm() -> None:
    """There the log-probs are NaN, which no weight of 0 would cancel."""
    origins = [(Origin.TEACHER, Origin.STUDENT)]
    batch = packed([(0, 1)], origins=origins, logprobs=[(math.nan, -1.0)])
    found = run(TrOPD(old_logprobs="rollout", top_k=2), batch, STUDENT.expand(2, 4), TEACHER.expand(2, 4))
    assert math.isfinite(found.loss)
    assert found.gradient_RV.isfinite().all()


def test_tokens_300_nats_apart_are_finite() -> None:
    apart = torch.tensor([[0.0, -300.0, 0.0, 0.0]])
    for outlier in ("forward_kl", "mask", "clip"):
        for student, teacher in ((apart, -apart), (-apart, apart)):
            found = run(TrOPD(outlier=outlier, top_k=2), packed([(1,)]), student, teacher)
            assert math.isfinite(found.loss)
            assert found.gradient_RV.isfinite().all()


def test_several_teachers_are_trusted_by_their_mean_log_prob() -> None:
    batch = packed([(0,) * 400])
    both = {"first": TEACHER.expand(400, 4), "second": STUDENT.expand(400, 4)}
    found = run(TrOPD(top_k=2, teacher_weights={"first": 1.0, "second": 3.0}), batch, STUDENT.expand(400, 4), both)
    assert found.metrics["objective/trust_probability"].value == pytest.approx(TRUST[0] ** 0.25)


def test_demonstrations_are_refused() -> None:
    batch = packed([(0,)], origins=[(Origin.CONSTRUCTED,)])
    with pytest.raises(ConfigError, match="learns from student and teacher tokens, the batch holds constructed tokens"):
        _plan(TrOPD(), batch)


def test_needs_and_settings() -> None:
    assert TrOPD().needs.teacher == Fidelity.TOP_K
    assert TrOPD(support="full").needs.teacher == Fidelity.FULL
    assert TrOPD(outlier="mask").needs.teacher == TrOPD(outlier="clip").needs.teacher == Fidelity.TOKEN
    assert TrOPD().needs.student_logprobs == "recompute"
    with pytest.raises(ValueError, match=r"clip_floor=0\.5: must be 0 or below"):
        TrOPD(clip_floor=0.5)
    with pytest.raises(ValueError, match=r"clip_floor=-0\.5: outlier=forward_kl does not read it"):
        TrOPD(clip_floor=-0.5)
    with pytest.raises(ValueError, match=r"guidance=-1\.0: must be 0 or above"):
        TrOPD(guidance=-1.0)


def test_the_golden_trust_probabilities_average_to_the_total_variation() -> None:
    q, p = STUDENT.softmax(-1), TEACHER.softmax(-1)
    assert (p / q).clamp(max=1).tolist() == pytest.approx(TRUST, abs=1e-9)
    assert (q * (1 - torch.tensor(TRUST, dtype=torch.float64))).sum().item() == pytest.approx(TOTAL_VARIATION, abs=1e-9)
    assert dense.divergence(STUDENT[None], TEACHER[None], 1.0, "total_variation").item() == pytest.approx(
        TOTAL_VARIATION, abs=1e-9
    )
