"""OPSD: what clipping single entries of a divergence does, and what the loss leaves to others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_distill.errors import ConfigError
from megatron_distill.objectives.opd import OPD
from megatron_distill.objectives.opsd import OPSD
from megatron_distill.types import Fidelity, Origin
from tests.unit.objectives.supervised import Answer, answers, golden, run

UNCLIPPED: dict[str, Any] = {"clip_high": None}


def test_the_paper_clips_from_above_only_so_the_loss_may_be_negative() -> None:
    """And the id that the teacher wants far more of loses probability: its gradient is above 0."""
    found = run(OPSD(), [golden()])
    assert found.loss == pytest.approx(-0.1777463682)
    expected = [-0.0278992039, 0.0519496030, -0.0226613796, -0.0013890196]
    assert found.gradients[0][0].tolist() == pytest.approx(expected, rel=1e-7)


def test_a_lower_bound_of_zero_leaves_no_gradient_where_the_one_positive_entry_is_clipped() -> None:
    found = run(OPSD(clip_low=0.0), [golden()])
    assert found.loss == pytest.approx(0.05)
    assert not found.gradients[0].any()


def test_without_bounds_it_is_the_forward_kl() -> None:
    found = run(OPSD(**UNCLIPPED), [golden()])
    assert found.loss == pytest.approx(0.5739102485)
    expected = [0.4185215310, -0.5163070416, 0.0769485505, 0.0208369601]
    assert found.gradients[0][0].tolist() == pytest.approx(expected, rel=1e-7)
    assert run(OPSD(clip_high=1e6), [golden()]).loss == pytest.approx(found.loss)


def test_a_high_upper_bound_is_not_the_forward_kl_again_where_entries_may_not_be_negative() -> None:
    assert run(OPSD(clip_low=0.0, clip_high=1e6), [golden()]).loss == pytest.approx(0.8016566168)


@pytest.mark.parametrize(
    ("fields", "loss"),
    [
        ({"divergence": "reverse_kl"}, 0.6783830802),
        ({"divergence": "jsd"}, 0.1463211437),
        ({"divergence": "jsd", "beta": 0.1}, 0.0514349723),
        ({"divergence": "jsd", "beta": 0.0}, 0.5739102485),
        ({"temperature": 2.0}, 0.1717410294),
        ({"support": "top_k", "top_k": 2}, 0.5732043710),
        ({"support": "top_k", "top_k": 2, "outside": "renormalise"}, 0.5491416681),
        ({"support": "top_k", "top_k": 2, "outside": "renormalise_teacher"}, 0.7060427411),
        ({"support": "top_k", "top_k": 2, "outside": "truncate"}, 0.6262749936),
    ],
)
def test_values_worked_out_by_hand(fields: dict[str, Any], loss: float) -> None:
    assert run(OPSD(**UNCLIPPED, **fields), [golden()]).loss == pytest.approx(loss, rel=1e-7)


def test_the_bound_is_of_entries_of_the_whole_divergence() -> None:
    """A JSD has one entry per id, of both its parts together; a top-k divergence has one for its tail."""
    found = run(OPSD(divergence="jsd", clip_high=0.01), [golden()]).loss
    assert 0 < found <= 4 * 0.01
    tail = run(OPSD(support="top_k", top_k=2, clip_low=-0.01, clip_high=0.01), [golden()]).loss
    assert tail == pytest.approx(-0.01 + 0.01 - 0.01)


def test_models_that_agree_have_neither_loss_nor_gradient() -> None:
    held = [Answer(tokens=one.tokens, student_RV=one.student_RV, teacher_RV=one.student_RV) for one in answers(3, 5)]
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        found = run(OPSD(divergence=divergence), held)
        assert abs(found.loss) < 1e-14
        assert all(one.abs().max() < 1e-14 for one in found.gradients)


def test_nothing_flows_into_the_teacher() -> None:
    for divergence in ("forward_kl", "jsd", "sampled_token"):
        assert run(OPSD(divergence=divergence), answers(3, 5)).teacher_gradient is None


def test_paper_and_code_average_differently() -> None:
    """Each response one vote, or each token; the same for responses of one length."""
    short, long = answers(1, 9)
    one, other = run(OPSD(), [short]).loss, run(OPSD(), [long]).loss
    assert run(OPSD(), [short, long]).loss == pytest.approx((one + other) / 2)
    assert run(OPSD(reduction="token_mean"), [short, long]).loss == pytest.approx((one + 9 * other) / 10)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_loss_and_gradient_do_not_depend_on_micro_batches(reduction: Any) -> None:
    held = answers(3, 1, 7, 2)
    whole, cut = run(OPSD(reduction=reduction), held), run(OPSD(reduction=reduction), held, budget=1)
    assert cut.loss == pytest.approx(whole.loss)
    for ours, theirs in zip(cut.gradients, whole.gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_sampled_token_is_on_policy_distillation_without_clip() -> None:
    held = answers(3, 5)
    found = run(OPSD(divergence="sampled_token", temperature=1.1), held)
    like = run(OPD(reduction="sequence_mean", temperature=1.1), held)
    assert found.loss == pytest.approx(like.loss)
    for ours, theirs in zip(found.gradients, like.gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_sampled_token_has_to_be_the_students() -> None:
    needs = OPSD(divergence="sampled_token").needs
    assert (needs.teacher, needs.origins, needs.unfiltered_samples) == (Fidelity.TOKEN, {Origin.STUDENT}, True)
    (one,) = answers(3)
    told = Answer(tokens=one.tokens, student_RV=one.student_RV, teacher_RV=one.teacher_RV, origin=Origin.CONSTRUCTED)
    with pytest.raises(ConfigError, match="learns from student tokens"):
        run(OPSD(divergence="sampled_token"), [told])
    assert run(OPSD(), [told]).loss == run(OPSD(), [one]).loss


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_low": 0.05}, "clip_low=0.05: must be below clip_high=0.05"),
        ({"beta": -0.1}, "beta=-0.1: must be between 0"),
        ({"beta": 0.1}, "beta=0.1: divergence=forward_kl does not read it; leave it 0.5"),
        ({"divergence": "sampled_token", "clip_high": 1.0}, "clip_high=1.0: divergence=sampled_token does not read it"),
        (
            {"divergence": "sampled_token", "support": "top_k"},
            "support=top_k: the sampled token compares",
        ),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPSD(**fields)


def test_no_bound_at_all_may_be_said_of_the_sampled_token() -> None:
    assert OPSD(divergence="sampled_token", clip_high=None).needs == OPSD(divergence="sampled_token").needs
