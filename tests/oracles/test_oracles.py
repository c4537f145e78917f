"""The oracles are right on their own: what the mathematics says of them, without the code that they judge."""

from __future__ import annotations

from collections.abc import Callable

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


# Below: the specification's golden numbers. Token-level ones are for one row of four ids, teacher p, student q.

STUDENT = torch.tensor([[1.0, 0.5, -0.5, -2.0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.0, 2.0, -1.0, -3.0]], dtype=torch.float64)


def _value_and_gradient(divergence: Callable[[Tensor], Tensor]) -> tuple[float, list[float]]:
    student = STUDENT.clone().requires_grad_()
    value = divergence(student).sum()
    (gradient,) = torch.autograd.grad(value, student)
    return value.item(), gradient[0].tolist()


GOLDEN: dict[str, tuple[Callable[[Tensor], Tensor], float, list[float] | None]] = {
    "forward_kl": (
        lambda z: dense.forward_kl(z, TEACHER, 1.0),
        0.5739102485,
        [0.4185215310, -0.5163070416, 0.0769485505, 0.0208369601],
    ),
    "reverse_kl": (
        lambda z: dense.reverse_kl(z, TEACHER, 1.0),
        0.6783830802,
        [0.4608556750, -0.5272705681, 0.0434702401, 0.0229446530],
    ),
    "jsd 0.1": (lambda z: dense.jsd(z, TEACHER, 1.0, 0.1), 0.0514349723, None),
    "jsd 0.5": (
        lambda z: dense.jsd(z, TEACHER, 1.0, 0.5),
        0.1463211437,
        [0.0967758667, -0.1167742137, 0.0151801603, 0.0048181867],
    ),
    "jsd 0.9": (lambda z: dense.jsd(z, TEACHER, 1.0, 0.9), 0.0582944254, None),
    "skew_forward_kl": (lambda z: dense.divergence(z, TEACHER, 1.0, "skew_forward_kl", 0.1), 0.4619562913, None),
    "skew_reverse_kl": (lambda z: dense.divergence(z, TEACHER, 1.0, "skew_reverse_kl", 0.1), 0.5035446022, None),
    "total_variation": (lambda z: dense.divergence(z, TEACHER, 1.0, "total_variation"), 0.5163070416, None),
    "mixed_kl": (
        lambda z: dense.divergence(z, TEACHER, 1.0, "mixed_kl", 0.25),
        0.25 * 0.5739102485 + 0.75 * 0.6783830802,
        None,
    ),
    "clip above": (
        lambda z: dense.forward_kl(z, TEACHER, 1.0, (None, 0.05)),
        -0.1777463682,
        [-0.0278992039, 0.0519496030, -0.0226613796, -0.0013890196],
    ),
    "clip to 0 .. 0.05": (lambda z: dense.forward_kl(z, TEACHER, 1.0, (0.0, 0.05)), 0.05, [0.0, 0.0, 0.0, 0.0]),
    "forward_kl at 2": (
        lambda z: dense.forward_kl(z, TEACHER, 2.0),
        0.1717410294,
        [0.0921377389, -0.1414692555, 0.0287728082, 0.0205587084],
    ),
    "reverse_kl at 2": (lambda z: dense.reverse_kl(z, TEACHER, 2.0), 0.1675457053, None),
    "jsd at 2": (lambda z: dense.jsd(z, TEACHER, 2.0, 0.5), 0.0417563123, None),
    "top 2, truncate": (
        lambda z: dense.top_k_divergence(z, TEACHER, 1.0, 2, "forward_kl", outside="truncate"),
        0.6262749936,
        [0.3932875921, -0.5316121992, 0.1130906682, 0.0252339389],
    ),
    "top 2, renormalise": (
        lambda z: dense.top_k_divergence(z, TEACHER, 1.0, 2, "forward_kl", outside="renormalise"),
        0.5491416681,
        [0.5032564092, -0.5032564092, 0.0, 0.0],
    ),
    "top 2, renormalise_teacher": (
        lambda z: dense.top_k_divergence(z, TEACHER, 1.0, 2, "forward_kl", outside="renormalise_teacher"),
        0.7060427411,
        None,
    ),
    "top 2, tail": (
        lambda z: dense.top_k_divergence(z, TEACHER, 1.0, 2, "forward_kl", outside="tail"),
        0.5732043710,
        [0.4185215310, -0.5163070416, 0.0799469376, 0.0178385730],
    ),
    "entropy": (lambda z: dense.entropy(z, 1.0), 1.0498892599, None),
}
"""By name: what is asked, its value, and its gradient in the student's logits where the specification has it."""


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors_of_one_row(name: str) -> None:
    divergence, value, gradient = GOLDEN[name]
    found = _value_and_gradient(divergence)
    assert found[0] == pytest.approx(value, abs=5e-10)
    if gradient is not None:
        assert found[1] == pytest.approx(gradient, abs=5e-10)
    assert sum(found[1]) == pytest.approx(0.0, abs=1e-12), "a shift of all logits changes nothing"


CHOSEN = torch.tensor([[1.0, 0, -1, 2], [0, 0, 1, -1]], dtype=torch.float64)
CHOSEN_TEACHER = torch.tensor([[0.0, 2, -1, 1], [1, 0, 0, -2]], dtype=torch.float64)


def test_golden_vectors_of_a_trajectory() -> None:
    logp = dense.logprob(CHOSEN, torch.tensor([3, 2]), 1.0)
    assert logp.tolist() == pytest.approx([-0.44018969856119533, -0.6265233750364457], abs=1e-15)
    assert dense.entropy(CHOSEN, 1.0).tolist() == pytest.approx([0.9475369639754256, 1.164406217776436], abs=1e-15)
    reverse, forward = (dense.divergence(CHOSEN, CHOSEN_TEACHER, 1.0, name) for name in ("reverse_kl", "forward_kl"))
    assert reverse.tolist() == pytest.approx([0.7065084404938173, 0.3633650484466005], abs=1e-15)
    assert forward.tolist() == pytest.approx([0.9638013829440019, 0.3729366506868757], abs=1e-15)


TOP_TWO = {
    ("renormalise", "forward_kl"): [1.0068420594147647, 0.11094407167172732],
    ("renormalise", "reverse_kl"): [0.8287249104088974, 0.12011450695827755],
    ("renormalise", "mixed_kl"): [0.917783484911831, 0.11552928931500243],
    ("tail", "reverse_kl"): [0.6884541999735516, 0.3633650484466008],
    ("tail", "forward_kl"): [0.9539542983708909, 0.3729366506868757],
}


@pytest.mark.parametrize(("outside", "name"), TOP_TWO)
def test_golden_vectors_of_two_ids_with_a_tie(outside: str, name: str) -> None:
    assert dense.top_ids(CHOSEN_TEACHER, 2).tolist() == [[1, 3], [0, 1]], "the lowest id first among equals"
    found = dense.top_k_divergence(CHOSEN, CHOSEN_TEACHER, 1.0, 2, name, 0.5, outside)
    assert found.tolist() == pytest.approx(TOP_TWO[outside, name], abs=1e-15)


@pytest.mark.parametrize(
    ("rewards", "advantages"),
    [
        ([1, 1, 0, 0, 0, 0, 0, 0], [1.6201817] * 2 + [-0.5400606] * 6),
        ([1, 1, 1, 0, 0, 0, 0, 0], [1.2076124] * 3 + [-0.7245674] * 5),
        ([1, 1, 1, 1, 0, 0, 0, 0], [0.9354126] * 4 + [-0.9354126] * 4),
        ([1, 1, 1, 0], [0.499999] * 3 + [-1.499997]),
        ([1, 1, 0, 0], [0.8660239] * 2 + [-0.8660239] * 2),
        ([1, 0], [0.7071058, -0.7071058]),
        ([1, 1, 1, 1], [0.0] * 4),
        ([1], [0.0]),
    ],
)
def test_golden_vectors_of_advantages(rewards: list[float], advantages: list[float]) -> None:
    # A second group beside it changes nothing.
    reward_S = torch.tensor([*rewards, 1.0, 0.0, 0.0], dtype=torch.float64)
    group_S = torch.tensor([0] * len(rewards) + [1] * 3)
    found = dense.group_advantages(reward_S, group_S)[: len(rewards)]
    assert found.tolist() == pytest.approx(advantages, abs=2e-6)


@pytest.mark.parametrize(
    ("reduction", "weights"),
    [
        ("sequence_mean", [-0.125, 0.0125, 0.025, 0.0625]),
        ("token_mean", [-0.075, 0.025, 0.025, 0.025]),
        ("sequence_sum", [-0.375, 0.125, 0.125, 0.125]),
    ],
)
def test_golden_vectors_of_reductions(reduction: str, weights: list[float]) -> None:
    """dL/dl per token for A = 1.5, -0.5, -0.5, -0.5; Dr.GRPO's is that of `sequence_sum` over its constant 16."""
    lengths = [3, 10, 5, 2]
    sequence_R = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    logp_R = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    advantage_R = torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64)[sequence_R]
    step = dense.Step(student_RV=logp_R, teachers_RV={}, target_R=sequence_R, sequence_R=sequence_R)
    (gradient,) = torch.autograd.grad(step.mean(-advantage_R * logp_R, reduction), logp_R)
    assert gradient[torch.tensor([0, 3, 13, 18])].tolist() == pytest.approx(weights, abs=1e-15)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_a_masked_sequence_counts_nothing(reduction: str) -> None:
    sequence_R = torch.tensor([0, 0, 1, 1, 2])
    value_R = torch.tensor([1.0, 3.0, float("nan"), float("inf"), 5.0], dtype=torch.float64)
    step = dense.Step(student_RV=value_R, teachers_RV={}, target_R=sequence_R, sequence_R=sequence_R)
    mask_R = torch.tensor([True, True, False, False, True])
    means = {"token_mean": 3.0, "sequence_mean": 3.5, "sequence_sum": 4.5}
    assert step.mean(value_R, reduction, mask_R) == means[reduction]
    assert step.mean(value_R, reduction, torch.zeros(5, dtype=torch.bool)) == 0.0


@pytest.mark.parametrize("outside", ["tail", "renormalise", "renormalise_teacher", "truncate"])
def test_all_ids_are_the_whole_divergence(outside: str) -> None:
    student, teacher = _logits(), _logits()
    for name in ("forward_kl", "reverse_kl", "jsd"):
        found = dense.top_k_divergence(student, teacher, 1.1, 9, name, 0.3, outside)
        torch.testing.assert_close(found, dense.divergence(student, teacher, 1.1, name, 0.3))
    assert (
        dense.top_k_divergence(student, teacher, 1.0, 3, "forward_kl") <= dense.forward_kl(student, teacher, 1.0)
    ).all()
