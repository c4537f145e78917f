"""SD-Zero: one pass for two records, numbers worked out by hand, and the ways in which either phase goes wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_distill.errors import DataError
from megatron_distill.objectives.sdzero import SDZero
from megatron_distill.objectives.sft import SFT
from megatron_distill.types import Fidelity, Stop
from tests.unit.objectives.trajectories import run, trajectory

# y_0 of 3, 1 and 2 tokens, a control phrase of 2, 1 and 2, y_1 of 4, 2 and 1.
TRACES = [
    trajectory("a", 0, 1.0, 9, origin="sssccs"),
    trajectory("a", 1, 1.0, 4, origin="scs"),
    trajectory("b", 0, 1.0, 5, origin="ssccs"),
]
LENGTHS, REVISED = (9, 4, 5), (4, 2, 1)


def _pulls(objective: SDZero, budget: int = 14) -> list[list[float]]:
    found = run(objective, TRACES, budget=budget)
    return [found.pulls[one.name] for one in TRACES]


def test_a_sum_counts_the_answer_once_and_the_revision_twice() -> None:
    pulls = _pulls(SDZero(phase="revision", reduction="sequence_sum"))
    for found, length, revised in zip(pulls, LENGTHS, REVISED, strict=True):
        assert found == pytest.approx([1 / 3] * (length - revised) + [2 / 3] * revised)


def test_a_mean_per_record_weighs_either_record_by_its_own_length() -> None:
    pulls = _pulls(SDZero(phase="revision", reduction="sequence_mean"))
    for found, length, revised in zip(pulls, LENGTHS, REVISED, strict=True):
        twice = (1 / length + 1 / revised) / 3
        assert found == pytest.approx([1 / length / 3] * (length - revised) + [twice] * revised)


def test_a_token_mean_averages_either_kind_of_record_over_the_whole_step() -> None:
    pulls = _pulls(SDZero(phase="revision"))
    for found, length, revised in zip(pulls, LENGTHS, REVISED, strict=True):
        assert found == pytest.approx([1 / 18] * (length - revised) + [1 / 18 + 1 / 7] * revised)


def test_one_pass_equals_two_records() -> None:
    """The generation records alone are ordinary fine-tuning on whole traces."""
    both = run(SDZero(phase="revision"), TRACES)
    generation = run(SFT(), TRACES)
    assert both.sums["loss/generation"] == pytest.approx(generation.loss)
    only = run(SDZero(phase="revision", generation_weight=0.0), TRACES)
    assert both.loss == pytest.approx(generation.loss + only.loss)
    assert only.pulls["a", 0] == pytest.approx([0.0] * 5 + [1 / 7] * 4)
    first = run(SDZero(phase="revision", revision_weight=0.0), TRACES)
    assert first.loss == pytest.approx(generation.loss)


def test_a_wrong_first_answer_can_be_imitated_less_but_its_phrase_is_learned() -> None:
    pulls = _pulls(SDZero(phase="revision", reduction="sequence_sum", init_weight=0.25))
    assert pulls[0] == pytest.approx([0.25 / 3] * 3 + [1 / 3] * 2 + [2 / 3] * 4)


def test_the_revision_follows_the_last_phrase() -> None:
    twice = [trajectory("a", 0, 1.0, 8, origin="scsccs")]
    found = run(SDZero(phase="revision", reduction="sequence_sum"), twice)
    assert found.pulls["a", 0] == pytest.approx([1.0] * 5 + [2.0] * 3)


def test_traces_without_a_phrase_are_refused() -> None:
    with pytest.raises(DataError, match="1 of the step's 4 traces have no control phrase"):
        run(SDZero(phase="revision"), [*TRACES, trajectory("c", 0, 1.0, 3)])


STUDENT = [[1.0, 0, -1, 2], [0, 0, 1, -1]]
TEACHER = [[0.0, 2, -1, 1], [1, 0, 0, -2]]


def _two_tokens(**common: Any) -> list[Any]:
    """A response of one token each, so that a mean over tokens shows both."""
    return [
        trajectory("a", sample, float(sample), [0], logits=STUDENT[sample], reference=TEACHER[sample], **common)
        for sample in range(2)
    ]


@pytest.mark.parametrize(
    ("fields", "divergences"),
    [
        ({"support": "full"}, [0.7065084404938173, 0.3633650484466005]),
        ({"support": "full", "divergence": "forward_kl"}, [0.9638013829440019, 0.3729366506868757]),
        ({}, [0.6884541999735516, 0.3633650484466005]),
        ({"divergence": "forward_kl"}, [0.9539542983708909, 0.3729366506868757]),
        ({"outside": "renormalise"}, [0.8287249104088974, 0.12011450695827755]),
        ({"outside": "renormalise", "divergence": "forward_kl"}, [1.0068420594147647, 0.11094407167172732]),
        ({"outside": "renormalise", "divergence": "mixed_kl"}, [0.917783484911831, 0.11552928931500243]),
    ],
)
def test_divergences_worked_out_by_hand(fields: dict[str, Any], divergences: list[float]) -> None:
    """Names say the direction by formula: `reverse_kl` is KL(student || teacher)."""
    objective = SDZero(top_k=2, **fields)
    for one, expected in zip(_two_tokens(), divergences, strict=True):
        assert run(objective, [one]).loss == pytest.approx(expected, rel=1e-6)
    assert run(objective, _two_tokens()).loss == pytest.approx(sum(divergences) / 2, rel=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "mixed_kl"])
@pytest.mark.parametrize(
    "support", [{"support": "full"}, {"top_k": 2}, {"top_k": 2, "outside": "renormalise"}], ids=str
)
def test_a_teacher_that_says_the_same_leaves_the_student_alone(divergence: Any, support: dict[str, Any]) -> None:
    same = [trajectory("a", 0, 1.0, 4, logits=STUDENT[0], reference=STUDENT[0])]
    found = run(SDZero(divergence=divergence, **support), same)
    assert found.loss == pytest.approx(0.0, abs=1e-12)
    assert found.gradients["a", 0].abs().max() < 1e-12


def test_the_released_loss_is_blind_to_what_the_teacher_did_not_name_and_the_default_is_not() -> None:
    """99 % of the student lie outside the teacher's ids, where both agree on ratios inside."""
    elsewhere = [trajectory("a", 0, 1.0, [3], logits=[1.0, 0, 6, 6], reference=[1.0, 0, -6, -6])]
    released = run(SDZero(divergence="mixed_kl", outside="renormalise", top_k=2), elsewhere)
    assert released.loss == pytest.approx(0.0, abs=1e-9)
    assert released.gradients["a", 0].abs().max() < 1e-9
    assert run(SDZero(top_k=2), elsewhere).loss > 5.0


ANSWERS = [
    trajectory("a", 0, 1.0, 2),
    trajectory("b", 0, 0.0, 6),
    trajectory("c", 0, 0.0, 9, stop=Stop.LENGTH),
]


def test_truncated_answers_are_left_out_of_the_sum_and_of_the_mean() -> None:
    found, alone = run(SDZero(top_k=2), ANSWERS, budget=9), run(SDZero(top_k=2), ANSWERS[:2])
    assert found.loss == pytest.approx(alone.loss)
    assert not found.gradients["c", 0].any()
    released = run(SDZero(top_k=2, mask_truncated=False), ANSWERS)
    assert released.gradients["c", 0].abs().sum() > 0
    assert released.plan.denominators == {"reverse_kl": 17.0}


@pytest.mark.parametrize(
    ("reduction", "weights"),
    [("token_mean", [1 / 8, 1 / 8]), ("sequence_mean", [1 / 4, 1 / 12]), ("sequence_sum", [1 / 2, 1 / 2])],
)
def test_a_sum_favours_long_answers_and_a_mean_per_sequence_short_ones(reduction: Any, weights: list[float]) -> None:
    objective = SDZero(top_k=2, reduction=reduction)
    whole = run(objective, ANSWERS[:2])
    alone = [run(SDZero(top_k=2, reduction="sequence_sum"), [one]) for one in ANSWERS[:2]]
    for one, single, weight in zip(ANSWERS[:2], alone, weights, strict=True):
        torch.testing.assert_close(whole.gradients[one.name], weight * single.gradients[one.name])


def test_needs_follow_from_the_phase_and_the_support() -> None:
    assert SDZero(phase="revision").needs.teacher is None
    assert not SDZero(phase="revision").needs.reward
    assert SDZero().needs.teacher == Fidelity.TOP_K
    assert SDZero(support="full").needs.teacher == Fidelity.FULL
    assert SDZero().needs.reward


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"forward_weight": 1.5}, "forward_weight=1.5: must be from 0 to 1"),
        ({"init_weight": -1.0}, "init_weight=-1.0: must be 0 or more"),
        ({"generation_weight": 0.0, "revision_weight": 0.0}, "one of them must be above 0"),
        ({"top_k": 0}, "top_k=0"),
        ({"forward_weight": 0.2}, "forward_weight=0.2: divergence=reverse_kl does not read it"),
        ({"init_weight": 0.5}, "init_weight=0.5: phase=distillation does not read it"),
        ({"phase": "revision", "top_k": 8}, "top_k=8: phase=revision does not read it"),
        ({"phase": "revision", "teacher_weights": {"self": 1.0}}, "phase=revision does not read it"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SDZero(**fields)
