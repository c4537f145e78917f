"""SDFT: which way its divergence goes, and what other code calls its settings."""

from __future__ import annotations

import pytest
import torch

from megatron_distill.objectives.sdft import SDFT
from megatron_distill.types import Fidelity
from tests.unit.objectives.supervised import answers, golden, run


def test_the_results_of_the_paper_are_the_forward_kl_and_its_text_the_reverse() -> None:
    assert run(SDFT(), [golden()]).loss == pytest.approx(0.5739102485)
    assert run(SDFT(divergence="reverse_kl"), [golden()]).loss == pytest.approx(0.6783830802)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_trls_alpha_is_beta(alpha: float) -> None:
    """There, m = (1-alpha) q + alpha p and the loss is (1-alpha) KL(q||m) + alpha KL(p||m), q the student."""
    (one,) = answers(1)
    q, p = one.student_RV.softmax(-1), one.teacher_RV.softmax(-1)
    m = (1 - alpha) * q + alpha * p
    theirs = (1 - alpha) * (q * (q / m).log()).sum() + alpha * (p * (p / m).log()).sum()
    assert run(SDFT(divergence="jsd", beta=alpha), [one]).loss == pytest.approx(float(theirs))


def test_nothing_is_clipped_unless_asked_for() -> None:
    held = [golden()]
    assert run(SDFT(clip_high=0.05), held).loss != pytest.approx(run(SDFT(), held).loss)


def test_ids_outside_the_teachers_likeliest_count_as_one() -> None:
    assert SDFT(support="top_k").needs.teacher == Fidelity.TOP_K
    found = run(SDFT(support="top_k", top_k=2), [golden()])
    assert found.loss == pytest.approx(0.5732043710)
    expected = [0.4185215310, -0.5163070416, 0.0799469376, 0.0178385730]
    assert found.gradients[0][0].tolist() == pytest.approx(expected, rel=1e-7)


def test_the_teacher_is_a_constant_and_nothing_goes_through_sampling() -> None:
    """The gradient in the logits of one token is that of its own divergence alone."""
    (one,) = answers(4)
    found = run(SDFT(), [one])
    assert found.teacher_gradient is None
    expected = (one.student_RV.softmax(-1) - one.teacher_RV.softmax(-1)) / 4
    torch.testing.assert_close(found.gradients[0], expected)
