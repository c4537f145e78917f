"""Divergences on one rank: published golden numbers, identities, conventions, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_distill.losses.divergence import (
    divergence,
    forward_kl,
    jsd,
    mixed_kl,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from megatron_distill.losses.kinds import Clip, Divergence
from megatron_distill.losses.vocab import entropy, logprob
from megatron_distill.testing.assertions import assert_close
from megatron_distill.types import VocabPartition, VocabShard
from tests.oracles import dense

STUDENT = [1.0, 0.5, -0.5, -2.0]
TEACHER = [0.0, 2.0, -1.0, -3.0]


def _shard(logits: Tensor, temperature: float = 1.0, valid: int | None = None) -> VocabShard:
    width = logits.shape[-1]
    partition = VocabPartition(start=0, width=width, valid=valid or width, group=None)
    return VocabShard.of(logits, partition, temperature)


def _golden(kind: Divergence, temperature: float = 1.0, clip: Clip | None = None) -> tuple[float, list[float]]:
    """Value and gradient in the raw student logits."""
    logits = torch.tensor([STUDENT], dtype=torch.float64, requires_grad=True)
    student = _shard(logits, temperature)
    teacher = _shard(torch.tensor([TEACHER], dtype=torch.float64), temperature)
    value = divergence(student, teacher, kind, clip=clip)
    value.sum().backward()
    assert logits.grad is not None
    return value.item(), logits.grad[0].tolist()


FORWARD, REVERSE, HALF = Divergence("forward_kl"), Divergence("reverse_kl"), Divergence("jsd", 0.5)


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        (FORWARD, 0.5739102485, [0.4185215310, -0.5163070416, 0.0769485505, 0.0208369601]),
        (REVERSE, 0.6783830802, [0.4608556750, -0.5272705681, 0.0434702401, 0.0229446530]),
        (HALF, 0.1463211437, [0.0967758667, -0.1167742137, 0.0151801603, 0.0048181867]),
        (Divergence("jsd", 0.1), 0.0514349723, None),
        (Divergence("jsd", 0.9), 0.0582944254, None),
        (Divergence("skew_forward_kl", 0.1), 0.4619562910, None),
        (Divergence("skew_reverse_kl", 0.1), 0.5035446022, None),
        (Divergence("total_variation"), 0.5163070416, None),
        (Divergence("mixed_kl", 0.25), 0.25 * 0.5739102485 + 0.75 * 0.6783830802, None),
    ],
    ids=str,
)
def test_golden_vectors(kind: Divergence, value: float, gradient: list[float] | None) -> None:
    found_value, found_gradient = _golden(kind)
    assert found_value == pytest.approx(value, abs=2e-10)
    assert sum(found_gradient) == pytest.approx(0.0, abs=4e-15)
    if gradient is not None:
        assert found_gradient == pytest.approx(gradient, abs=1e-10)


def test_a_pointwise_clip_gates_and_does_not_bound() -> None:
    """A clipped id that the teacher wants more of is pushed *down*, and the loss may be negative (OPSD's clip)."""
    value, gradient = _golden(FORWARD, clip=Clip(high=0.05))
    assert value == pytest.approx(-0.1777463682, abs=1e-10)
    assert gradient == pytest.approx([-0.0278992039, 0.0519496030, -0.0226613796, -0.0013890196], abs=1e-10)
    # Bounded from below too, the only positive entry is a constant, and so are the negative ones.
    assert _golden(FORWARD, clip=Clip(low=0.0, high=0.05)) == (pytest.approx(0.05, abs=1e-15), [0.0] * 4)


@pytest.mark.parametrize(
    "kind", [FORWARD, REVERSE, HALF, Divergence("skew_reverse_kl", 0.3), Divergence("mixed_kl", 0.6)], ids=str
)
def test_a_clip_that_is_never_reached_changes_nothing_but_one_at_zero_does(kind: Divergence) -> None:
    value, gradient = _golden(kind)
    for clip in (Clip(), Clip(high=1e6), Clip(low=-1e6, high=1e6)):
        found_value, found_gradient = _golden(kind, clip=clip)
        assert found_value == pytest.approx(value, abs=1e-14)
        assert found_gradient == pytest.approx(gradient, abs=1e-14)
    if kind in (FORWARD, REVERSE):
        assert _golden(kind, clip=Clip(low=0.0))[0] > value


def test_temperature_divides_both_models_and_there_is_no_factor_of_its_square() -> None:
    value, gradient = _golden(FORWARD, temperature=2.0)
    assert value == pytest.approx(0.1717410294, abs=1e-10)
    assert gradient == pytest.approx([0.0921377389, -0.1414692555, 0.0287728082, 0.0205587084], abs=1e-10)
    assert _golden(REVERSE, temperature=2.0)[0] == pytest.approx(0.1675457053, abs=1e-10)
    assert _golden(HALF, temperature=2.0)[0] == pytest.approx(0.0417563123, abs=1e-10)


def test_golden_entropies_and_logprobs() -> None:
    student, teacher = (_shard(torch.tensor([logits], dtype=torch.float64)) for logits in (STUDENT, TEACHER))
    assert entropy(student).item() == pytest.approx(1.0498892599, abs=1e-10)
    assert entropy(teacher).item() == pytest.approx(0.5561988261, abs=1e-10)
    probabilities = [logprob(student, torch.tensor([id])).exp().item() for id in range(4)]
    assert probabilities == pytest.approx([0.5320711504, 0.3227174659, 0.1187211210, 0.0264902627], abs=1e-10)


KINDS = [
    FORWARD,
    REVERSE,
    Divergence("jsd", 0.3),
    Divergence("skew_forward_kl", 0.1),
    Divergence("skew_reverse_kl", 0.1),
    Divergence("mixed_kl", 0.7),
    Divergence("total_variation"),
]


@pytest.mark.parametrize("clip", [(None, None), (None, 0.02), (0.0, 0.05), (-0.01, None), (-0.01, 0.01)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_divergence_and_clip_equals_the_dense_reference(
    kind: Divergence, clip: tuple[float | None, float | None]
) -> None:
    logits = (torch.randn(6, 40, dtype=torch.float64) * 3).requires_grad_()
    dense_logits, upstream = logits.detach()[:, :37].clone().requires_grad_(), torch.randn(6, dtype=torch.float64)
    teacher = torch.randn(6, 40, dtype=torch.float64) * 3
    found = divergence(_shard(logits, 1.3, valid=37), _shard(teacher, 1.3, valid=37), kind, clip=Clip(*clip))
    expected = dense.divergence(dense_logits, teacher[:, :37], 1.3, kind.name, kind.parameter, clip)
    assert_close(found, expected, "value")
    (gradient,) = torch.autograd.grad(found, logits, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, dense_logits, upstream)
    assert_close(gradient[:, :37], expected_gradient, "gradient")
    assert not gradient[:, 37:].any()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equal_models_have_no_divergence_and_no_gradient(kind: Divergence) -> None:
    logits = (torch.randn(5, 1000) * 4).requires_grad_()
    value = divergence(_shard(logits, 1.3, valid=990), _shard(logits.detach().clone(), 1.3, valid=990), kind)
    value.sum().backward()
    assert logits.grad is not None
    assert value.abs().max() < 1e-7
    assert logits.grad.abs().max() < 1e-7


def test_a_constant_added_to_a_models_logits_changes_nothing() -> None:
    student, teacher = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    for kind in KINDS:
        torch.testing.assert_close(
            divergence(_shard(student + 70), _shard(teacher - 900), kind),
            divergence(_shard(student), _shard(teacher), kind),
        )


def test_beta_weights_the_teacher() -> None:
    """By hand for two ids: p = (.9, .1), q = (.5, .5), beta = .8, so m = (.82, .18)."""
    student = _shard(torch.tensor([[0.5, 0.5]], dtype=torch.float64).log())
    teacher = _shard(torch.tensor([[0.9, 0.1]], dtype=torch.float64).log())
    p_part = 0.9 * torch.tensor(0.9 / 0.82).log() + 0.1 * torch.tensor(0.1 / 0.18).log()
    q_part = 0.5 * torch.tensor(0.5 / 0.82).log() + 0.5 * torch.tensor(0.5 / 0.18).log()
    assert jsd(student, teacher, 0.8).item() == pytest.approx((0.8 * p_part + 0.2 * q_part).item(), rel=1e-6)


def test_jsd_at_its_ends_is_the_unscaled_kl_and_near_them_the_scaled_one() -> None:
    student, teacher = (_shard(torch.randn(3, 20, dtype=torch.float64)) for _ in range(2))
    assert torch.equal(jsd(student, teacher, 0.0), forward_kl(student, teacher))
    assert torch.equal(jsd(student, teacher, 1.0), reverse_kl(student, teacher))
    tiny = 1e-6
    torch.testing.assert_close(jsd(student, teacher, tiny) / tiny, forward_kl(student, teacher), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        jsd(student, teacher, 1 - tiny) / tiny, reverse_kl(student, teacher), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("beta", [-0.1, 1.5, float("nan")])
def test_beta_outside_its_range_is_refused(beta: float) -> None:
    shard = _shard(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="between 0"):
        jsd(shard, shard, beta)


def test_skewing_by_nothing_is_no_skew_and_mixtures_end_in_the_kls() -> None:
    student, teacher = (_shard(torch.randn(3, 20, dtype=torch.float64)) for _ in range(2))
    assert torch.equal(skew_forward_kl(student, teacher, 0.0), forward_kl(student, teacher))
    assert torch.equal(skew_reverse_kl(student, teacher, 0.0), reverse_kl(student, teacher))
    torch.testing.assert_close(mixed_kl(student, teacher, 1.0), forward_kl(student, teacher))
    torch.testing.assert_close(mixed_kl(student, teacher, 0.0), reverse_kl(student, teacher))
    torch.testing.assert_close(skew_forward_kl(student, teacher, 1e-9), forward_kl(student, teacher), rtol=1e-6, atol=0)
    torch.testing.assert_close(skew_reverse_kl(student, teacher, 1e-9), reverse_kl(student, teacher), rtol=1e-6, atol=0)


def test_total_variation_lies_between_none_and_all() -> None:
    far = torch.tensor([[0.0, -200.0], [-200.0, 0.0]])
    torch.testing.assert_close(total_variation(_shard(far), _shard(far.flip(0))), torch.ones(2))


@pytest.mark.parametrize("alpha", [-0.1, 1.0, float("nan")])
def test_a_skew_outside_its_range_is_refused(alpha: float) -> None:
    shard = _shard(torch.zeros(1, 4))
    for skewed in (skew_forward_kl, skew_reverse_kl):
        with pytest.raises(ValueError, match="must be"):
            skewed(shard, shard, alpha)
    with pytest.raises(ValueError, match="must be"):
        mixed_kl(shard, shard, alpha * 2)


def test_the_teacher_gets_no_gradient_even_if_it_could() -> None:
    student, teacher = torch.randn(2, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    for kind in KINDS:
        divergence(_shard(student), _shard(teacher), kind).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_shards_of_different_columns_are_never_compared() -> None:
    logits = torch.zeros(2, 8)
    ours = VocabShard.of(logits, VocabPartition(start=0, width=8, valid=8, group=None))
    for theirs in (
        VocabPartition(start=8, width=8, valid=16, group=None),
        VocabPartition(start=0, width=8, valid=7, group=None),
    ):
        with pytest.raises(AssertionError, match="vocabulary columns"):
            forward_kl(ours, VocabShard.of(logits, theirs))


def test_low_precision_logits_are_computed_wide() -> None:
    """Models that nearly agree, in bf16: the divergence comes out right although its size is below bf16's steps."""
    student = (torch.randn(4, 2000) * 3).bfloat16()
    teacher = (student.float() + 0.05 * torch.randn(4, 2000)).bfloat16()
    expected = torch.nn.functional.kl_div(
        student.double().log_softmax(-1), teacher.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(forward_kl(_shard(student), _shard(teacher)).double(), expected, rtol=1e-3, atol=0)


def test_two_teachers_of_no_rows_leave_an_empty_gradient() -> None:
    """A rank without sequences: all empty tensors have one address, which is not to be taken for one memory."""
    partition = VocabPartition(start=0, width=8, valid=7, group=None)
    leaf_Rv = torch.zeros(0, 8, requires_grad=True)
    student = VocabShard.of(leaf_Rv * 1.0, partition, disposable=True)
    teachers = [VocabShard.of(torch.zeros(0, 8), partition) for _ in range(2)]
    (forward_kl(student, teachers[0]) + jsd(student, teachers[1], 0.5)).sum().backward()
    assert leaf_Rv.grad is not None
    assert leaf_Rv.grad.shape == (0, 8)
