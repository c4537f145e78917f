"""On-policy distillation: what its two ways of taking the reverse KL teach, and with whose log-probs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_distill.errors import DataError
from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.opd import OPD
from megatron_distill.types import Fidelity, TokenStats
from tests.oracles import dense
from tests.unit.objectives.judged import STUDENT, TEACHER, every_token, packed, run

OLD = torch.tensor([0.3, 0.4, 0.2, 0.1], dtype=torch.float64)
"""A policy that sampled before the last update."""


def _gradient(value: Callable[[Tensor], Tensor]) -> Tensor:
    logits = STUDENT.clone().requires_grad_()
    value(logits).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_sampled_tokens_teach_the_reverse_kl_in_expectation(temperature: float) -> None:
    exact = _gradient(lambda logits: dense.reverse_kl(logits[None], TEACHER[None], temperature).sum())
    found = every_token(OPD(temperature=temperature))
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-9)


def test_with_the_samplers_log_probs_the_advantage_is_the_samplers_too() -> None:
    """The recipe's expected gradient is that of KL(q||p) - KL(q||q_old): the ratio corrects who sampled, not A."""

    def between(logits: Tensor) -> Tensor:
        towards = dense.reverse_kl(logits[None], TEACHER[None], 1.0)
        return (towards - dense.reverse_kl(logits[None], OLD.log()[None], 1.0)).sum()

    found = every_token(OPD(old_logprobs="rollout"), OLD)
    torch.testing.assert_close(found, _gradient(between), rtol=1e-6, atol=1e-7)
    assert (every_token(OPD(), OLD) - _gradient(between)).abs().max() > 0.05, "the ratio made no difference"


def test_a_limit_of_the_importance_ratio_is_felt_beyond_it_only() -> None:
    batch = packed([(1,)], logprobs=[(-5.0,)])
    logp = float(STUDENT.log_softmax(-1)[1])
    free = run(OPD(old_logprobs="rollout"), batch, STUDENT[None], TEACHER[None])
    for limit, share in ((2.0, 2.0 / math.exp(logp + 5.0)), (100.0, 1.0)):
        held = run(OPD(old_logprobs="rollout", ratio_limit=limit), batch, STUDENT[None], TEACHER[None])
        assert held.loss == pytest.approx(share * free.loss)
        torch.testing.assert_close(held.gradient_RV, share * free.gradient_RV)
    with pytest.raises(ValueError, match=r"ratio_limit=2\.0: every ratio is 1 with old_logprobs=current"):
        OPD(ratio_limit=2.0)
    with pytest.raises(ValueError, match=r"ratio_limit=0\.5: must be 1 or more"):
        OPD(old_logprobs="rollout", ratio_limit=0.5)


def test_a_token_of_the_golden_vector() -> None:
    found = run(OPD(), packed([(1,)]), STUDENT[None], TEACHER[None])
    assert found.loss == pytest.approx(-0.9554626946, abs=1e-9)
    assert found.gradient_RV[0].tolist() == pytest.approx(
        [0.5083741351, -0.6471181951, 0.1134336022, 0.0253104578], abs=1e-9
    )
    exact = run(OPD(divergence="reverse_kl"), packed([(1,)]), STUDENT[None], TEACHER[None])
    assert exact.loss == pytest.approx(0.6783830802, abs=1e-9)


@pytest.mark.parametrize("outside", ["tail", "renormalise", "renormalise_teacher", "truncate"])
def test_a_teachers_whole_vocabulary_as_its_top_k_is_the_full_divergence(outside: str) -> None:
    batch = packed([(1, 3), (0,)])
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    full = run(OPD(divergence="reverse_kl"), batch, student, teacher)
    top = OPD(divergence="reverse_kl", support="top_k", top_k=4, outside=outside)
    found = run(top, batch, student, teacher)
    assert found.loss == pytest.approx(full.loss, rel=1e-9)
    torch.testing.assert_close(found.gradient_RV, full.gradient_RV, rtol=1e-8, atol=1e-10)


def test_a_prompts_data_source_chooses_its_teacher() -> None:
    batch = packed([(1,), (1,)], sources=["math", "code"])
    both = {"solver": TEACHER.expand(2, 4), "coder": -TEACHER.expand(2, 4)}
    found = run(OPD(teacher_sources={"math": "solver", "code": "coder"}), batch, STUDENT.expand(2, 4), both)
    for row, teacher in enumerate((TEACHER, -TEACHER)):
        alone = run(OPD(), packed([(1,)]), STUDENT[None], teacher[None])
        torch.testing.assert_close(2 * found.gradient_RV[row], alone.gradient_RV[0])


def test_a_student_that_equals_its_teacher_has_nothing_to_learn() -> None:
    batch = packed([(1, 3), (0,)])
    logits = torch.randn(3, 4)
    for objective in (OPD(), OPD(divergence="reverse_kl"), OPD(divergence="reverse_kl", support="top_k", top_k=2)):
        found = run(objective, batch, logits, logits)
        assert abs(found.loss) < 1e-12
        assert found.gradient_RV.abs().max() < 1e-12


def test_a_token_300_nats_down_is_finite() -> None:
    apart = torch.tensor([[0.0, -300.0, 0.0, 0.0]])
    for objective in (OPD(), OPD(divergence="reverse_kl")):
        for student, teacher in ((apart, -apart), (-apart, apart)):
            found = run(objective, packed([(1,)]), student, teacher)
            assert found.gradient_RV.isfinite().all()
            assert abs(found.loss) < 1000


def test_samples_without_the_engines_log_probs_are_refused() -> None:
    with pytest.raises(DataError, match="old_logprobs=rollout: the step holds tokens of the student without"):
        OPD(old_logprobs="rollout").prepare(TokenStats(), packed([(1,)]), Scope(seed=0, step=0), {})


def test_what_it_needs_follows_from_how_it_looks() -> None:
    assert OPD().needs.teacher == Fidelity.TOKEN
    assert OPD().needs.student_logprobs == "none"
    assert OPD().needs.unfiltered_samples
    assert OPD(old_logprobs="rollout").needs.student_logprobs == "rollout"
    assert OPD(divergence="reverse_kl", support="top_k").needs.teacher == Fidelity.TOP_K
    assert not OPD(divergence="reverse_kl").needs.unfiltered_samples
    with pytest.raises(ValueError, match="old_logprobs=rollout: divergence=reverse_kl samples nothing"):
        OPD(divergence="reverse_kl", old_logprobs="rollout")
    with pytest.raises(ValueError, match="support=top_k: divergence=sampled_token compares single log-probs"):
        OPD(support="top_k")
