"""The oracles are right on their own: what the mathematics says of them, without the code that they judge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracles import dense

TEMPERATURES = [1.0, 1.1, 2.0]


def _logits(rows: int = 6, vocabulary: int = 9) -> Tensor:
    return torch.randn(rows, vocabulary, dtype=torch.float64) * 2


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_divergences_are_positive_and_vanish_where_the_models_agree(temperature: float) -> None:
    student, teacher = _logits(), _logits()
    for divergence in (
        dense.forward_kl,
        dense.reverse_kl,
        lambda one, other, warm: dense.jsd(one, other, warm, 0.3),
    ):
        assert (divergence(student, teacher, temperature) > 0).all()
        assert divergence(student, student + 4.0, temperature).abs().max() < 1e-14


def test_torch_agrees_on_forward_kl_and_logprobs() -> None:
    student, teacher = _logits(), _logits()
    ids = torch.arange(6)
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(dense.forward_kl(student, teacher, 1.0), expected)
    expected = -torch.nn.functional.cross_entropy(student, ids, reduction="none")
    torch.testing.assert_close(dense.logprob(student, ids, 1.0), expected)
    expected = torch.distributions.Categorical(logits=student).entropy()
    torch.testing.assert_close(dense.entropy(student, 1.0), expected)


def test_jsd_tends_to_the_kls_when_scaled() -> None:
    student, teacher = _logits(), _logits()
    small = 1e-7
    near_forward = dense.jsd(student, teacher, 1.0, small) / small
    torch.testing.assert_close(near_forward, dense.forward_kl(student, teacher, 1.0), rtol=1e-4, atol=1e-4)
    near_reverse = dense.jsd(student, teacher, 1.0, 1 - small) / small
    torch.testing.assert_close(near_reverse, dense.reverse_kl(student, teacher, 1.0), rtol=1e-4, atol=1e-4)


def test_reductions_weight_tokens_or_sequences() -> None:
    step = dense.Step(
        student_RV=_logits(3), teachers_RV={}, target_R=torch.zeros(3), sequence_R=torch.tensor([0, 0, 1])
    )
    value = torch.tensor([1.0, 2.0, 6.0])
    assert step.mean(value, "token_mean") == 3.0
    assert step.mean(value, "sequence_mean") == 3.75
    assert step.teacher_average({"a": value, "b": 3 * value}, None).tolist() == [2.0, 4.0, 12.0]
    assert step.teacher_average({"a": value, "b": 3 * value}, {"a": 3.0, "b": 1.0}).tolist() == [1.5, 3.0, 9.0]
