"""Every loss over a sharded vocabulary against a dense float64 reference: value, gradient, padding, collectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.losses import divergence, vocab
from megatron_distill.losses.kinds import Clip, Divergence
from megatron_distill.testing.assertions import TOLERANCE
from megatron_distill.testing.collectives import counted
from megatron_distill.testing.world import Worlds
from megatron_distill.types import Full, VocabPartition, VocabShard
from tests.oracles import dense

ROWS = 7

type Loss = Callable[[VocabShard, VocabShard, Tensor], Tensor]
type Reference = Callable[[Tensor, Tensor, Tensor, float], Tensor]

LOSSES: dict[str, tuple[Loss, Reference]] = {
    "forward_kl": (
        lambda s, t, ids: divergence.forward_kl(s, t),
        lambda s, t, ids, warm: dense.forward_kl(s, t, warm),
    ),
    "reverse_kl": (
        lambda s, t, ids: divergence.reverse_kl(s, t),
        lambda s, t, ids, warm: dense.reverse_kl(s, t, warm),
    ),
    **{
        f"jsd_{beta}": (
            lambda s, t, ids, beta=beta: divergence.jsd(s, t, beta),
            lambda s, t, ids, warm, beta=beta: dense.jsd(s, t, warm, beta),
        )
        for beta in (0.1, 0.5, 0.9)
    },
    **{
        name: (
            lambda s, t, ids, kind=kind, clip=clip: divergence.divergence(s, t, kind, clip=Clip(*clip)),
            lambda s, t, ids, warm, kind=kind, clip=clip: dense.divergence(s, t, warm, kind.name, kind.parameter, clip),
        )
        for name, (kind, clip) in {
            "mixed_kl": (Divergence("mixed_kl", 0.3), (None, None)),
            "skew_reverse_kl": (Divergence("skew_reverse_kl", 0.1), (None, None)),
            "total_variation": (Divergence("total_variation"), (None, None)),
            "clipped_kl": (Divergence("reverse_kl"), (-0.01, 0.02)),
        }.items()
    },
    "logprob": (
        lambda s, t, ids: vocab.logprob(s, ids),
        lambda s, t, ids, warm: dense.logprob(s, ids, warm),
    ),
    "entropy": (
        lambda s, t, ids: vocab.entropy(s),
        lambda s, t, ids, warm: dense.entropy(s, warm),
    ),
    "logprob_and_entropy": (
        lambda s, t, ids: torch.stack(vocab.logprob_and_entropy(s, ids)).T @ _pair_like(s),
        lambda s, t, ids, warm: dense.logprob(s, ids, warm) - 0.7 * dense.entropy(s, warm),
    ),
}


def _pair_like(shard: VocabShard) -> Tensor:
    """Weights of log-prob and entropy, in the type of the arithmetic."""
    return shard.scaled_Rv().new_tensor([1.0, -0.7])


@dataclass(frozen=True)
class Errors:
    """Relative errors on one rank; the reference's largest entry over all ranks is the scale."""

    value: float
    gradient: float
    padding: float
    """Largest gradient of a padding column; must be 0."""


def _partition(valid: int, padded: int) -> VocabPartition:
    width = padded // dist.get_world_size()
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    return VocabPartition(start=dist.get_rank() * width, width=width, valid=valid, group=group)


def _laid(weight_VH: Tensor, partition: VocabPartition, filler: float) -> Tensor:
    """This rank's rows of a weight that was padded for someone else: real rows are kept, the rest is `filler`."""
    padded = torch.full((partition.start + partition.width, weight_VH.shape[1]), filler, dtype=weight_VH.dtype)
    real = weight_VH[: partition.valid][: padded.shape[0]]
    padded[: real.shape[0]] = real
    return padded[partition.start :]


def _errors(name: str, dtype: torch.dtype, valid: int, padded: int, temperature: float) -> Errors:
    """Loss and gradient of a linear output layer on this rank, against the dense reference."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden_RH, teacher_RH = draw(ROWS, 8), draw(ROWS, 12)
    # The models come with paddings of their own, the teacher's full of large numbers.
    weight_VH, teacher_VH = draw(padded, 8), 0.7 * draw(valid + 6, 12)
    teacher_VH[valid:] = 1e3
    ids_R = torch.randint(valid, (ROWS,), generator=generator)
    upstream_R = draw(ROWS)
    loss, reference = LOSSES[name]

    partition = _partition(valid, padded)
    logits_Rv = (hidden_RH @ _laid(weight_VH, partition, 1e3).T).requires_grad_()
    full = Full(hidden_RH=teacher_RH, head_vH=_laid(teacher_VH, partition, -50.0), partition=partition)
    value_R = loss(VocabShard.of(logits_Rv, partition, temperature), full.shard(temperature), ids_R)
    (value_R * upstream_R).sum().backward()
    assert logits_Rv.grad is not None
    assert not full.hidden_RH.requires_grad

    student_RV = (hidden_RH @ weight_VH[:valid].T).double().requires_grad_()
    expected_R = reference(student_RV, (teacher_RH @ teacher_VH[:valid].T).double(), ids_R, temperature)
    (expected_R * upstream_R.double()).sum().backward()
    assert student_RV.grad is not None
    real = partition.valid_width
    mine = student_RV.grad[:, partition.start : partition.start + real]
    gradient_error = (logits_Rv.grad[:, :real].double() - mine).abs()
    return Errors(
        value=((value_R.double() - expected_R).abs().max() / expected_R.abs().max()).item(),
        gradient=(gradient_error.max() / student_RV.grad.abs().max()).item() if real else 0.0,
        padding=logits_Rv.grad[:, real:].abs().max().item() if real < partition.width else 0.0,
    )


def _all_errors(dtype: torch.dtype) -> dict[str, Errors]:
    """Every loss, temperature and padding; with 128 columns for 50 ids the last ranks hold nothing but padding."""
    return {
        f"{name} V={valid}/{padded} T={temperature}": _errors(name, dtype, valid, padded, temperature)
        for name in LOSSES
        for valid, padded in ((50, 52), (50, 64), (50, 128), (3001, 3072))
        for temperature in (1.0, 1.3)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_loss_and_gradient_equal_the_dense_reference(
    worlds: Worlds, ranks: int, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    found = worlds(ranks).run(_all_errors, dtype)
    for what in ("value", "gradient", "padding"):
        worst, case = max((getattr(errors, what), case) for rank in found for case, errors in rank.items())
        record_property(what, worst)
        allowed = 0.0 if what == "padding" else TOLERANCE[dtype]
        assert worst <= allowed, f"{case}: {what} is off by {worst:.3g}, allowed {allowed:.3g}"
        print(f"TP={ranks} {dtype} {what}: worst {worst:.2e} at {case}")


def _far_logits() -> dict[str, bool]:
    """Whether loss and gradient are finite with ids 300 nats down or excluded, in one model, the other, or both."""
    partition = _partition(valid=50, padded=64)
    columns = torch.arange(partition.start, partition.start + partition.width)
    ids_R = torch.zeros(ROWS, dtype=torch.long)
    finite: dict[str, bool] = {}
    for depth in (-300.0, -30000.0, float("-inf")):
        for who in ("student", "teacher", "both", "apart"):
            student = torch.randn(ROWS, partition.width)
            teacher = torch.randn(ROWS, partition.width)
            if who in ("student", "both", "apart"):
                student[:, columns % 3 == 1] = depth
            if who in ("teacher", "both"):
                teacher[:, columns % 3 == 1] = depth
            if who == "apart":
                teacher[:, columns % 3 != 1] = depth
            for name, (loss, _) in LOSSES.items():
                logits = student.clone().requires_grad_()
                value = loss(VocabShard.of(logits, partition), VocabShard.of(teacher, partition), ids_R)
                value.sum().backward()
                assert logits.grad is not None
                finite[f"{name} {who} {depth}"] = bool(value.isfinite().all() and logits.grad.isfinite().all())
    return finite


@pytest.mark.parametrize("ranks", [1, 2])
def test_ids_far_down_or_excluded_give_finite_loss_and_gradient(worlds: Worlds, ranks: int) -> None:
    for finite in worlds(ranks).run(_far_logits):
        assert not [case for case, fine in finite.items() if not fine]


def _excluded_by_a_rank() -> list[float]:
    """KLs of models of which one excludes every id of the last rank, as differences to the same on one rank alone."""
    generator = torch.Generator().manual_seed(11)
    student, teacher = torch.randn(ROWS, 64, generator=generator), torch.randn(ROWS, 64, generator=generator)
    teacher[:, 32:] = float("-inf")
    partition = _partition(valid=64, padded=64)
    whole = VocabPartition(start=0, width=64, valid=64, group=None)
    differences = []
    for one, other in ((student, teacher), (teacher, student)):
        for loss in (divergence.forward_kl, divergence.reverse_kl):
            mine = slice(partition.start, partition.start + partition.width)
            cut = loss(VocabShard.of(one[:, mine], partition), VocabShard.of(other[:, mine], partition))
            uncut = loss(VocabShard.of(one, whole), VocabShard.of(other, whole))
            differences.append(((cut - uncut).abs() / uncut.abs()).max().item())
    return differences


def test_models_that_differ_by_a_whole_ranks_ids_have_one_divergence_under_every_cut(worlds: Worlds) -> None:
    """Infinite in truth where the other model is certain; `LOWEST` stands in, by far more than what cuts change."""
    for differences in worlds(2).run(_excluded_by_a_rank):
        assert max(differences) < 1e-3


def _unknown_ids() -> tuple[list[float], list[float], float]:
    """Log-probs of ids that are none beside one that is; largest gradient of their rows, and of the last row."""
    partition = _partition(valid=50, padded=64)
    ids_R = torch.tensor([-100, -1, 50, 63, 64, 200, 49])
    logits = torch.randn(ROWS, partition.width, requires_grad=True)
    logp_R = vocab.logprob(VocabShard.of(logits, partition), ids_R)
    logp_R.sum().backward()
    assert logits.grad is not None
    both_R, entropy_R = vocab.logprob_and_entropy(VocabShard.of(logits.detach(), partition), ids_R)
    assert torch.equal(both_R, logp_R)
    assert entropy_R.isfinite().all()
    return logp_R.tolist(), logits.grad[:-1].abs().amax(-1).tolist(), logits.grad[-1].abs().max().item()


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_id_that_is_none_has_no_probability_and_no_gradient(worlds: Worlds, ranks: int) -> None:
    for logp, gradients, of_known in worlds(ranks).run(_unknown_ids):
        assert logp[:-1] == [float("-inf")] * 6
        assert gradients == [0.0] * 6
        assert -100 < logp[-1] < 0 < of_known


def _nan_logits() -> list[bool]:
    partition = _partition(valid=50, padded=64)
    student = torch.randn(ROWS, partition.width)
    if dist.get_rank() == 0:
        student[0, 3] = float("nan")
    teacher = VocabShard.of(torch.randn(ROWS, partition.width), partition)
    ids_R = torch.ones(ROWS, dtype=torch.long)
    values = [loss(VocabShard.of(student, partition), teacher, ids_R) for loss, _ in LOSSES.values()]
    return [bool(value[0].isnan() and value[1:].isfinite().all()) for value in values]


def test_a_nan_logit_is_never_hidden(worlds: Worlds) -> None:
    assert all(all(rank) for rank in worlds(2).run(_nan_logits))


def _collectives() -> dict[str, tuple[dict[str, int], int]]:
    partition = _partition(valid=50, padded=64)
    teacher = VocabShard.of(torch.randn(ROWS, partition.width), partition)
    ids_R = torch.zeros(ROWS, dtype=torch.long)
    found = {}
    for name, (loss, _) in LOSSES.items():
        logits = torch.randn(ROWS, partition.width, requires_grad=True)
        with counted() as forward:
            value = loss(VocabShard.of(logits, partition), teacher, ids_R)
        with counted() as backward:
            value.sum().backward()
        found[name] = (dict(forward), backward.total())
    with counted() as forward:
        vocab.top_k(teacher, 5)
    found["top_k"] = (dict(forward), 0)
    return found


def test_collectives_are_two_or_three_forward_and_none_backward(worlds: Worlds) -> None:
    for found in worlds(2).run(_collectives):
        assert found.pop("top_k") == ({"all_gather": 1}, 0)
        for name, calls in found.items():
            linear = name in ("forward_kl", "reverse_kl", "mixed_kl", "logprob", "entropy", "logprob_and_entropy")
            assert calls == ({"all_reduce": 2 if linear else 3}, 0), name


def _one_rank_group() -> int:
    """A group of one rank makes no calls at all."""
    partition = VocabPartition(start=0, width=64, valid=50, group=dist.new_group([dist.get_rank()]))
    shard = VocabShard.of(torch.randn(ROWS, 64), partition)
    with counted() as calls:
        for loss, _ in LOSSES.values():
            loss(shard, shard, torch.zeros(ROWS, dtype=torch.long))
        vocab.top_k(shard, 5)
    return calls.total()


def test_one_rank_needs_no_collective(worlds: Worlds) -> None:
    assert worlds(1).run(_one_rank_group) == [0]


def _top_k_case(k: int, ties: bool, valid: int, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits_RV = torch.randn(ROWS, padded, generator=generator)
    if ties:
        logits_RV = logits_RV.mul(2).round()
    partition = _partition(valid, padded)
    shard = VocabShard.of(logits_RV[:, partition.start : partition.start + partition.width], partition)
    return *vocab.top_k(shard, k), logits_RV[:, :valid]


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("k", [1, 5, 40, 50])
@pytest.mark.parametrize(("ranks", "padded"), [(1, 64), (2, 64), (4, 64), (4, 128)])
def test_top_k_is_exact_and_the_lowest_id_wins_a_tie(
    worlds: Worlds, ranks: int, padded: int, k: int, ties: bool
) -> None:
    """Over 128 columns the last two of four ranks hold nothing but padding."""
    for ids, logp, logits in worlds(ranks).run(_top_k_case, k, ties, 50, padded):
        expected = logits.argsort(dim=-1, descending=True, stable=True)[:, :k]
        assert torch.equal(ids, expected)
        torch.testing.assert_close(logp, logits.double().log_softmax(-1).gather(-1, expected).float())
