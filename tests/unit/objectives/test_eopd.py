"""EOPD: a forward KL that is added where the teacher is undecided, and never takes the reverse KL's place."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_distill.losses.signal import teacher_entropy
from megatron_distill.objectives.eopd import EOPD
from megatron_distill.objectives.opd import OPD
from megatron_distill.types import Fidelity, Full, VocabPartition
from tests.oracles import dense
from tests.unit.objectives.judged import STUDENT, TEACHER, every_token, packed, run

DECIDED = torch.tensor([0.0, 9.0, 0.0, 0.0], dtype=torch.float64)
ENTROPY = 0.5561988261
"""Of the golden teacher, in nats."""
BATCH = packed([(1, 0, 3), (2, 1)])
STUDENTS = STUDENT.expand(5, 4)
TEACHERS = torch.stack([TEACHER, DECIDED, TEACHER, DECIDED, TEACHER])
UNDECIDED = torch.tensor([True, False, True, False, True])
TRUNCATED = torch.tensor([0.3932875921, -0.5316121992, 0.1130906682, 0.0252339389], dtype=torch.float64)
"""Gradient of the golden top-2 forward KL."""


@pytest.mark.parametrize("silent", [{"entropy_threshold": math.inf}, {"alpha": 0.0}, {"entropy_threshold": 100.0}])
def test_without_undecided_tokens_it_is_on_policy_distillation(silent: dict[str, float]) -> None:
    found = run(EOPD(top_k=2, **silent), BATCH, STUDENTS, TEACHERS)
    plain = run(OPD(), BATCH, STUDENTS, TEACHERS)
    assert found.loss == pytest.approx(plain.loss, rel=1e-12)
    torch.testing.assert_close(found.gradient_RV, plain.gradient_RV, rtol=1e-12, atol=0)
    assert found.sums["loss/forward_kl"] == 0.0


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_the_forward_kl_is_added_and_nothing_is_switched_off(alpha: float) -> None:
    """An undecided token has both gradients, a decided one the reverse KL's; all tokens count below the line."""
    found = run(EOPD(top_k=2, entropy_threshold=0.5, alpha=alpha), BATCH, STUDENTS, TEACHERS)
    plain = run(OPD(), BATCH, STUDENTS, TEACHERS)
    added = 5 * (found.gradient_RV - plain.gradient_RV)
    torch.testing.assert_close(added[~UNDECIDED], torch.zeros(2, 4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(added[UNDECIDED], alpha * TRUNCATED.expand(3, 4), rtol=0, atol=1e-7)
    assert found.sums["loss/reverse_kl"] == pytest.approx(plain.loss)
    assert found.sums["loss/forward_kl"] == pytest.approx(alpha * 0.6262749936 * 3 / 5, rel=1e-6)


def test_the_threshold_itself_counts_as_undecided() -> None:
    """The paper's text says above, its code at or above."""
    partition = VocabPartition(start=0, width=4, valid=4, group=None)
    signal = Full(hidden_RH=TEACHER[None], head_vH=torch.eye(4, dtype=torch.float64), partition=partition)
    exact = teacher_entropy(signal, 1.0).item()
    assert exact == pytest.approx(ENTROPY, abs=1e-9)
    for threshold, added in ((exact, True), (exact + 1e-9, False)):
        found = run(EOPD(top_k=2, entropy_threshold=threshold), BATCH, STUDENTS, TEACHERS)
        assert (found.sums["loss/forward_kl"] > 0) is added


def test_the_entropy_is_of_the_whole_vocabulary_at_the_loss_temperature() -> None:
    """The teacher's likeliest id alone says nothing of how undecided it is."""
    level = torch.zeros(5, 4)
    found = run(EOPD(top_k=1, entropy_threshold=math.log(4) - 1e-6), BATCH, STUDENTS, level)
    assert found.sums["loss/forward_kl"] != 0.0
    assert EOPD(support="top_k").needs.teacher == Fidelity.FULL
    hotter = EOPD(top_k=2, entropy_threshold=0.8, temperature=2.0)
    assert dense.entropy(TEACHER[None], 2.0).item() > 0.8 > ENTROPY
    assert run(hotter, BATCH, STUDENTS, TEACHERS).sums["loss/forward_kl"] > 0.0


def test_a_teacher_that_names_its_top_k_only_gives_a_lower_bound_of_its_entropy() -> None:
    p = TEACHER.softmax(-1).sort(descending=True).values
    bounds = [torch.special.entr(torch.cat([p[:k], p[k:].sum()[None]])).sum().item() for k in (1, 2, 4)]
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(ENTROPY, abs=1e-9)
    for k, bound in zip((1, 2, 4), bounds, strict=True):
        for threshold, added in ((bound - 1e-6, True), (bound + 1e-6, False)):
            objective = EOPD(top_k=k, entropy_of="top_k", entropy_threshold=threshold)
            assert (run(objective, BATCH, STUDENTS, TEACHERS).sums["loss/forward_kl"] != 0.0) is added
    assert EOPD(entropy_of="top_k").needs.teacher == Fidelity.TOP_K


def test_a_negative_forward_kl_keeps_its_gradient() -> None:
    """Cut to the top-k it is negative where the student has more of them; clamped at 0 it would teach nothing there."""
    student = torch.tensor([0.3, 2.0, -9.0, -9.0])
    found = run(EOPD(top_k=2, entropy_threshold=0.0), packed([(1,)]), student[None], TEACHER[None])
    plain = run(OPD(), packed([(1,)]), student[None], TEACHER[None])
    assert found.sums["loss/forward_kl"] < 0
    assert (found.gradient_RV - plain.gradient_RV).abs().max() > 0.01


def test_expected_gradient_is_that_of_both_divergences() -> None:
    logits = STUDENT.clone().requires_grad_()
    forward = dense.top_k_divergence(logits[None], TEACHER[None], 1.0, 2, "forward_kl", outside="truncate")
    (dense.reverse_kl(logits[None], TEACHER[None], 1.0) + 0.5 * forward).sum().backward()
    assert logits.grad is not None
    found = every_token(EOPD(top_k=2, entropy_threshold=0.5, alpha=0.5))
    torch.testing.assert_close(found, logits.grad, rtol=1e-6, atol=1e-8)


def test_the_ratio_is_clipped_with_the_engines_log_probs() -> None:
    """A token of positive advantage whose probability has risen by more than the clip allows stops pulling."""
    logp = STUDENT.log_softmax(-1)[1].item()
    for moved, pulls in ((0.1, True), (0.3, False)):
        batch = packed([(1,)], logprobs=[(logp - moved,)])
        objective = EOPD(top_k=2, entropy_threshold=math.inf, old_logprobs="rollout")
        gradient = run(objective, batch, STUDENT[None], TEACHER[None]).gradient_RV
        assert bool(gradient.any()) is pulls


def test_each_of_several_teachers_is_asked_by_itself_whether_it_is_undecided() -> None:
    both = {"first": TEACHER.expand(5, 4), "second": DECIDED.expand(5, 4)}
    found = run(EOPD(top_k=2, entropy_threshold=0.5), BATCH, STUDENTS, both)
    assert found.sums["loss/forward_kl"] == pytest.approx(0.5 * 0.6262749936, rel=1e-6)


def test_tokens_300_nats_apart_are_finite() -> None:
    apart = torch.tensor([[0.0, -300.0, 0.0, 0.0]])
    for student, teacher in ((apart, -apart), (-apart, apart)):
        found = run(EOPD(top_k=2, entropy_threshold=0.0), packed([(1,)]), student, teacher)
        assert math.isfinite(found.loss)
        assert found.gradient_RV.isfinite().all()


@pytest.mark.parametrize(
    ("field", "value"), [("alpha", -1.0), ("entropy_threshold", -0.1), ("clip_ratio", 0.0), ("clip_ratio", 1.0)]
)
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}: must be"):
        EOPD(**{field: value})
    with pytest.raises(ValueError, match="entropy_threshold=nan"):
        EOPD(entropy_threshold=math.nan)
