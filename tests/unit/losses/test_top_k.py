"""Top-k divergences on one rank: published golden numbers, fixed points, identities, edges and refusals.

Parity with the dense reference over tensor-parallel ranks is in tests/distributed/test_top_k.py.
"""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megatron_distill.losses import backend
from megatron_distill.losses.divergence import divergence
from megatron_distill.losses.kinds import Clip, Divergence, Name, Outside
from megatron_distill.losses.top_k import top_k_divergence
from megatron_distill.losses.vocab import logprob
from megatron_distill.testing.assertions import assert_close
from megatron_distill.types import TopK, VocabPartition, VocabShard
from tests.oracles import dense

STUDENT = [1.0, 0.5, -0.5, -2.0]
TEACHER = [0.0, 2.0, -1.0, -3.0]

OUTSIDES: tuple[Outside, ...] = get_args(Outside.__value__)
KINDS = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd", 0.3),
    Divergence("skew_forward_kl", 0.1),
    Divergence("skew_reverse_kl", 0.1),
    Divergence("mixed_kl", 0.4),
    Divergence("total_variation"),
]
FORWARD, REVERSE, MIXED = Divergence("forward_kl"), Divergence("reverse_kl"), Divergence("mixed_kl", 0.5)


def _shard(logits: Tensor, temperature: float = 1.0, valid: int | None = None) -> VocabShard:
    width = logits.shape[-1]
    return VocabShard.of(logits, VocabPartition(start=0, width=width, valid=valid or width, group=None), temperature)


def _top(logits: Tensor, ids: list[list[int]] | Tensor | int, temperature: float = 1.0) -> TopK:
    """A teacher's signal of some ids, or of its k likeliest."""
    logp = dense.log_softmax(logits.double(), temperature)
    ids_RK = dense.top_ids(logits, ids) if isinstance(ids, int) else torch.as_tensor(ids)
    top = logp.gather(-1, ids_RK.clamp(0, logits.shape[-1] - 1)).to(logits.dtype)
    return TopK(logp_R=top[:, 0], ids_RK=ids_RK, top_logp_RK=top)


def _value_and_gradient(logits: Tensor, *rest: Any, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = top_k_divergence(_shard(logits, temperature), *rest)
    value.sum().backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


@pytest.mark.parametrize(
    ("outside", "value", "gradient"),
    [
        ("truncate", 0.6262749936, [0.3932875921, -0.5316121992, 0.1130906682, 0.0252339389]),
        ("renormalise", 0.5491416681, [0.5032564092, -0.5032564092, 0.0, 0.0]),
        ("renormalise_teacher", 0.7060427411, None),
        ("tail", 0.5732043710, [0.4185215310, -0.5163070416, 0.0799469376, 0.0178385730]),
    ],
)
def test_golden_forward_kl(outside: Outside, value: float, gradient: list[float] | None) -> None:
    student, teacher = (torch.tensor([row], dtype=torch.float64) for row in (STUDENT, TEACHER))
    found, found_gradient = _value_and_gradient(student, _top(teacher, [[1, 0]]), FORWARD, outside)
    assert found.item() == pytest.approx(value, abs=1e-10)
    assert found_gradient.sum().item() == pytest.approx(0.0, abs=1e-15)
    if gradient is not None:
        assert found_gradient[0].tolist() == pytest.approx(gradient, abs=1e-10)


@pytest.mark.parametrize(
    ("kind", "outside", "values"),
    [
        (FORWARD, "renormalise", [1.0068420594147647, 0.11094407167172732]),
        (REVERSE, "renormalise", [0.8287249104088974, 0.12011450695827755]),
        (MIXED, "renormalise", [0.917783484911831, 0.11552928931500243]),
        (FORWARD, "tail", [0.9539542983708909, 0.3729366506868757]),
        (REVERSE, "tail", [0.6884541999735516, 0.3633650484466008]),
    ],
)
def test_golden_rows(kind: Divergence, outside: Outside, values: list[float]) -> None:
    """In row 1 student and teacher give the two ids of the tail the same ratio: the tail costs nothing."""
    student = torch.tensor([[1.0, 0, -1, 2], [0, 0, 1, -1]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 2, -1, 1], [1, 0, 0, -2]], dtype=torch.float64)
    found, _ = _value_and_gradient(student, _top(teacher, [[1, 3], [0, 1]]), kind, outside)
    assert found.tolist() == pytest.approx(values, abs=1e-14)


P = [0.5, 0.2, 0.1, 0.1, 0.06, 0.04]


@pytest.mark.parametrize(
    ("kind", "outside", "top", "tail"),
    [
        (FORWARD, "tail", [0.5, 0.2, 0.1], 0.2),
        (REVERSE, "tail", [0.5, 0.2, 0.1], 0.2),
        (FORWARD, "truncate", [0.625, 0.25, 0.125], 0.0),
        (FORWARD, "renormalise_teacher", [0.625, 0.25, 0.125], 0.0),
        (REVERSE, "truncate", [0.5 / torch.e, 0.2 / torch.e, 0.1 / torch.e], 1 - 0.8 / torch.e),
        (FORWARD, "renormalise", None, None),
        (REVERSE, "renormalise", None, None),
    ],
)
def test_where_gradient_descent_ends(
    kind: Divergence, outside: Outside, top: list[float] | None, tail: float | None
) -> None:
    """Only the tail bucket gives the k ids their mass in the teacher; truncation sends all of it to them or away."""
    logits = torch.tensor([[0.3, -0.2, 0.5, 0.1, -0.4, 0.9]], dtype=torch.float64)
    teacher = _top(torch.tensor([P], dtype=torch.float64).log(), [[0, 1, 2]])
    for _ in range(1000 if tail == 0.0 else 300):
        logits = logits - 4.0 * _value_and_gradient(logits, teacher, kind, outside)[1]
    end = logits.softmax(-1)[0]
    if top is None:
        assert end[:3].div(end[:3].sum()).tolist() == pytest.approx([0.625, 0.25, 0.125], abs=1e-6)
        # logits off S have no gradient at all
        assert torch.equal(logits[0, 3:], torch.tensor([0.1, -0.4, 0.9], dtype=torch.float64))
        return
    within = 2e-3 if tail == 0.0 else 1e-6
    assert end[:3].tolist() == pytest.approx(top, abs=within)
    assert end[3:].sum().item() == pytest.approx(tail, abs=within)


@pytest.mark.parametrize("outside", OUTSIDES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_all_ids_named_is_the_full_divergence(kind: Divergence, outside: Outside) -> None:
    """No tail is left over from the rounding of 1 - P, and padding does not count as one."""
    student, teacher = torch.randn(4, 24), torch.randn(4, 24)
    logits = student.clone().requires_grad_()
    expected = divergence(_shard(logits, 1.3, valid=20), _shard(teacher, 1.3, valid=20), kind)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    found = divergence(_shard(logits, 1.3, valid=20), _top(teacher[:, :20], 20, 1.3), kind, outside=outside)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert_close(found, expected, "value")
    assert_close(gradient, expected_gradient, "gradient")
    assert not gradient[:, 20:].any()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_tail_bucket_is_a_lower_bound(kind: Divergence) -> None:
    student, teacher = torch.randn(50, 40, dtype=torch.float64), torch.randn(50, 40, dtype=torch.float64)
    full = divergence(_shard(student), _shard(teacher), kind)
    bucket = top_k_divergence(_shard(student), _top(teacher, 7), kind, "tail")
    assert (bucket <= full + 1e-12).all()
    assert (bucket >= -1e-12).all()


@pytest.mark.parametrize("outside", ["tail", "renormalise"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_equal_models_have_no_divergence_and_no_gradient(kind: Divergence, outside: Outside) -> None:
    logits = torch.randn(6, 200)
    value, gradient = _value_and_gradient(logits, _top(logits, 8), kind, outside)
    assert value.abs().max() < 1e-6
    # |q - p| has a kink there, and rounding decides which side is felt
    assert gradient.abs().max() < 1e-7 or kind.name == "total_variation"


def test_a_bound_above_pushes_down_what_the_teacher_wants_most() -> None:
    """Opposite to the unclipped divergence: a clipped id has no pull of its own left, only its share of the rest."""
    student, teacher = (torch.tensor([row], dtype=torch.float64) for row in (STUDENT, TEACHER))
    _, plain = _value_and_gradient(student, _top(teacher, [[1, 0]]), FORWARD, "tail")
    value, clipped = _value_and_gradient(student, _top(teacher, [[1, 0]]), FORWARD, "tail", Clip(high=0.05))
    assert plain[0, 1] < 0 < clipped[0, 1]
    assert value.item() < 0


@pytest.mark.parametrize("outside", OUTSIDES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("depth", [-300.0, -30000.0, float("-inf")])
def test_ids_far_down_or_excluded_are_finite(depth: float, kind: Divergence, outside: Outside) -> None:
    """The student excludes the teacher's ids, the rest, or some of both; the teacher excludes some of its k."""
    top = torch.arange(12) < 4
    for excluded in (top, ~top, torch.arange(12) % 2 == 0):
        student, teacher = torch.randn(3, 12), torch.randn(3, 12)
        student[:, excluded] = depth
        teacher[:, 2] = depth
        for signal in (_top(teacher, [[0, 1, 2, 3]] * 3), _top(teacher.masked_fill(~top, depth), [[0, 1, 2, 3]] * 3)):
            value, gradient = _value_and_gradient(student, signal, kind, outside)
            assert value.isfinite().all()
            assert gradient.isfinite().all()


def test_a_tail_that_underflows_still_has_its_gradient() -> None:
    """q of every tail id is 0 in fp32; the teacher's mass pulls them up all the same, each by its share."""
    student = torch.tensor([[5.0, 4.0, -300.0, -301.0]])
    teacher = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    value, gradient = _value_and_gradient(student, _top(teacher, 2), FORWARD, "tail")
    tail = teacher.softmax(-1)[0, 2:].sum()
    share = torch.tensor([0.0, -1.0]).softmax(-1)
    torch.testing.assert_close(gradient[0, 2:], -tail * share)
    assert value.item() > 30


@pytest.mark.parametrize("ids", [[3, 1, 3], [0, 1, -1], [0, 1, 40], [0, 1, 45]], ids=str)
def test_ids_that_repeat_or_are_none_stop_the_step_and_touch_nobody_else(ids: list[int]) -> None:
    """-100 and padding (40 real ids of 48) hold no probability; an id twice would count twice."""
    logits = torch.randn(2, 48, requires_grad=True)
    teacher = _top(torch.randn(2, 48), [ids, [5, 6, 7]])
    for kind in KINDS:
        for outside in OUTSIDES:
            logits.grad = None
            value = top_k_divergence(_shard(logits, valid=40), teacher, kind, outside)
            value.sum().backward()
            assert value[0] == float("inf")
            assert value[1].isfinite()
            assert logits.grad is not None
            assert not logits.grad[0].any()
            assert logits.grad[1].any()


def test_the_students_logits_are_as_they_were() -> None:
    """They are changed on the way; a graph that has saved them does not notice, and a failure puts them back."""
    leaf = torch.randn(3, 20, requires_grad=True)
    logits = leaf * 1.0
    squares = logits.square().sum()
    before, version = logits.detach().clone(), logits._version
    top_k_divergence(_shard(logits), _top(torch.randn(3, 20), 4), FORWARD, "tail").sum().backward(retain_graph=True)
    assert torch.equal(logits, before)
    assert logits._version == version
    squares.backward()


def test_no_rows() -> None:
    logits = torch.randn(0, 20, requires_grad=True)
    for outside in OUTSIDES:
        value = top_k_divergence(_shard(logits), _top(torch.randn(0, 20), 4), REVERSE, outside)
        assert value.shape == (0,)
        value.sum().backward()


def test_refusals() -> None:
    student, teacher = _shard(torch.randn(2, 20), valid=10), _top(torch.randn(2, 20), 11)
    with pytest.raises(ValueError, match="k=11: the vocabulary has 10 ids"):
        top_k_divergence(student, teacher, FORWARD, "tail")
    with pytest.raises(ValueError, match="outside=drop: must be"):
        top_k_divergence(student, _top(torch.randn(2, 20), 4), FORWARD, "drop")
    with pytest.raises(ValueError, match="alpha=1"):
        top_k_divergence(student, _top(torch.randn(2, 20), 4), Divergence("skew_forward_kl", 1.0), "tail")


def test_every_kind_is_tried() -> None:
    assert {kind.name for kind in KINDS} == set(get_args(Name.__value__))


@pytest.mark.parametrize("outside", OUTSIDES)
@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: kind.name)
def test_the_gradient_may_take_the_place_of_disposable_logits(kind: Divergence, outside: Outside) -> None:
    """Unless something else is still to read them: then it does not."""
    student, teacher = torch.randn(4, 48), _top(torch.randn(4, 40), 5, 1.3)
    partition = VocabPartition(start=0, width=48, valid=40, group=None)

    def gradient(disposable: bool, also: bool) -> tuple[Tensor, bool]:
        logits = student.clone().requires_grad_()
        shard = VocabShard.of(logits, partition, 1.3, disposable=disposable)
        value = top_k_divergence(shard, teacher, kind, outside).sum()
        if also:
            value = value + logprob(shard, torch.arange(4)).sum()
        (found,) = torch.autograd.grad(value, logits)
        return found, found.data_ptr() == logits.data_ptr()

    for also in (False, True):
        expected, taken = gradient(False, also)
        assert not taken
        found, taken = gradient(True, also)
        assert taken or also
        assert torch.equal(found, expected)


@pytest.mark.parametrize("outside", OUTSIDES)
def test_low_precision_logits_are_read_wide(outside: Outside) -> None:
    """bf16 in: the loss of these very numbers to fp32 accuracy, the gradient rounded once."""
    student, teacher = torch.randn(8, 300).bfloat16(), _top(torch.randn(8, 300), 9)
    expected, expected_gradient = _value_and_gradient(student.double(), teacher, REVERSE, outside)
    value, gradient = _value_and_gradient(student, teacher, REVERSE, outside)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert_close(value, expected, "value")
    assert_close(gradient, expected_gradient, "gradient", 2**-8)


BACKENDS = [
    pytest.param("compiled", "cpu", marks=pytest.mark.slow),
    *(
        pytest.param(
            name,
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
        )
        for name in ("compiled", "triton")
    ),
]


@pytest.mark.parametrize(("name", "device"), BACKENDS)
def test_every_backend_gives_the_same(name: backend.Name, device: str) -> None:
    """Ids of S are hidden from the regions as -inf, beside ids that are excluded or far down anyway."""
    student, teacher = torch.randn(6, 1024) * 2, torch.randn(6, 1003) * 2
    student[:, torch.arange(1024) % 7 == 1] -= 300.0
    student[:, torch.arange(1024) % 11 == 3] = float("-inf")
    student[:, 1003:] = 1e4
    top = _top(teacher, 16, 1.3)
    partition = VocabPartition(start=0, width=1024, valid=1003, group=None)

    def run(outside: Outside, device: str) -> tuple[Tensor, Tensor]:
        logits = student.clone().to(device).requires_grad_()
        shard = VocabShard.of(logits, partition, 1.3, disposable=True)
        there = TopK(logp_R=top.logp_R.to(device), ids_RK=top.ids_RK.to(device), top_logp_RK=top.top_logp_RK.to(device))
        value = top_k_divergence(shard, there, REVERSE, outside)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        return value.detach().cpu(), gradient.cpu()

    try:
        for outside in OUTSIDES:
            backend.use("eager")
            expected = run(outside, "cpu")
            backend.use(name)
            for found, wanted, what in zip(run(outside, device), expected, ("value", "gradient"), strict=True):
                assert_close(found, wanted, f"{outside}: {what}")
    finally:
        backend.use("eager")
