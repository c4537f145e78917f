"""Top-k divergences over a sharded vocabulary against the dense float64 reference: value, gradient, collectives."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.losses.kinds import Clip, Divergence, Outside
from megatron_distill.losses.signal import teacher_top_k
from megatron_distill.losses.top_k import top_k_divergence
from megatron_distill.testing.assertions import TOLERANCE, relative_error
from megatron_distill.testing.collectives import counted
from megatron_distill.testing.world import Worlds
from megatron_distill.types import Full, TopK, VocabPartition, VocabShard
from tests.oracles import dense

ROWS = 7
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
CLIPS = [None, Clip(high=0.05)]
SHAPES = [(50, 52, 5), (50, 64, 50), (50, 128, 9), (3001, 3072, 64)]
"""(real ids, padded, k). With 128 columns for 50 ids the last ranks hold nothing but padding."""


def _partition(valid: int, padded: int) -> VocabPartition:
    width = padded // dist.get_world_size()
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    return VocabPartition(start=dist.get_rank() * width, width=width, valid=valid, group=group)


def _models(dtype: torch.dtype, valid: int, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both over all ranks, padding full of large numbers, and an upstream gradient."""
    generator = torch.Generator().manual_seed(3)
    student_RV, teacher_RV = (
        torch.randn(ROWS, padded, generator=generator, dtype=torch.float64).mul(1.5).to(dtype) for _ in range(2)
    )
    student_RV[:, valid:], teacher_RV[:, valid:] = 1e3, 1e3
    return student_RV, teacher_RV, torch.randn(ROWS, generator=generator, dtype=torch.float64).to(dtype)


def _mine(logits_RV: Tensor, partition: VocabPartition) -> Tensor:
    return logits_RV[:, partition.start : partition.start + partition.width].clone()


def _errors(
    dtype: torch.dtype, shape: tuple[int, int, int], temperature: float, kind: Divergence, outside: Outside, clip: Any
) -> tuple[float, float, float]:
    """Relative errors of value and gradient, and the largest gradient of a padding column, on this rank."""
    valid, padded, k = shape
    partition = _partition(valid, padded)
    student_RV, teacher_RV, upstream_R = _models(dtype, valid, padded)
    real_RV = teacher_RV[:, :valid].double()
    ids_RK = dense.top_ids(real_RV, k)
    # as a teacher elsewhere sends them: in no order that means anything here
    ids_RK = ids_RK[:, torch.randperm(k, generator=torch.Generator().manual_seed(1))]
    top = dense.log_softmax(real_RV, temperature).gather(-1, ids_RK).to(dtype)
    logits_Rv = _mine(student_RV, partition).requires_grad_()
    shard = VocabShard.of(logits_Rv, partition, temperature)
    value_R = top_k_divergence(shard, TopK(logp_R=top[:, 0], ids_RK=ids_RK, top_logp_RK=top), kind, outside, clip)
    (value_R * upstream_R).sum().backward()
    assert logits_Rv.grad is not None

    expected_RV = student_RV[:, :valid].double().requires_grad_()
    bounds = (None, None) if clip is None else (clip.low, clip.high)
    expected_R = dense.top_k_divergence(
        expected_RV, real_RV, temperature, k, kind.name, kind.parameter, outside, bounds
    )
    (expected_R * upstream_R.double()).sum().backward()
    assert expected_RV.grad is not None
    real = partition.valid_width
    mine = expected_RV.grad[:, partition.start : partition.start + real]
    error = (logits_Rv.grad[:, :real].double() - mine).abs()
    return (
        relative_error(value_R.detach(), expected_R.detach()),
        (error.max() / expected_RV.grad.abs().max()).item() if real else 0.0,
        logits_Rv.grad[:, real:].abs().max().item() if real < partition.width else 0.0,
    )


def _all_errors(dtype: torch.dtype) -> dict[str, tuple[float, float, float]]:
    return {
        f"{kind.name} {outside} {clip} {shape} T={temperature}": _errors(dtype, shape, temperature, kind, outside, clip)
        for kind in KINDS
        for outside in OUTSIDES
        for clip, temperature in zip(CLIPS, (1.3, 1.0), strict=True)
        for shape in SHAPES
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_value_and_gradient_equal_the_dense_reference(worlds: Worlds, ranks: int, dtype: torch.dtype) -> None:
    found = worlds(ranks).run(_all_errors, dtype)
    for place, what in enumerate(("value", "gradient", "padding")):
        worst, case = max((errors[place], case) for rank in found for case, errors in rank.items())
        allowed = 0.0 if what == "padding" else TOLERANCE[dtype]
        assert worst <= allowed, f"{case}: {what} is off by {worst:.3g}, allowed {allowed:.3g}"
        print(f"TP={ranks} {dtype} {what}: worst {worst:.2e} at {case}")


def _collectives() -> dict[str, tuple[int, int]]:
    partition = _partition(50, 64)
    student_RV, teacher_RV, _ = _models(torch.float32, 50, 64)
    ids_RK = dense.top_ids(teacher_RV[:, :50], 9)
    top = dense.log_softmax(teacher_RV[:, :50], 1.0).gather(-1, ids_RK)
    teacher = TopK(logp_R=top[:, 0], ids_RK=ids_RK, top_logp_RK=top)
    found = {}
    for kind in KINDS:
        for outside in OUTSIDES:
            for clip in CLIPS:
                logits_Rv = _mine(student_RV, partition).requires_grad_()
                with counted(most_elements=3 * ROWS) as forward:
                    value = top_k_divergence(VocabShard.of(logits_Rv, partition), teacher, kind, outside, clip)
                with counted() as backward:
                    value.sum().backward()
                found[f"{kind.name} {outside} {clip}"] = (forward.total(), backward.total())
    return found


def test_two_collectives_for_the_kls_three_for_others_none_backward(worlds: Worlds) -> None:
    """And never one of [R, K]."""
    for found in worlds(2).run(_collectives):
        for name, calls in found.items():
            two = name.startswith(("forward_kl", "reverse_kl")) and name.endswith("None")
            assert calls == (2 if two else 3, 0), name


def _one_answer() -> list[Tensor]:
    """A full signal's top k on this rank's shard, and the divergence from it: replicated everywhere."""
    partition = _partition(50, 64)
    generator = torch.Generator().manual_seed(5)
    hidden_RH, head_VH = torch.randn(ROWS, 8, generator=generator), torch.randn(64, 8, generator=generator)
    head_vH = head_VH[partition.start : partition.start + partition.width]
    full = Full(hidden_RH=hidden_RH, head_vH=head_vH, partition=partition)
    teacher = teacher_top_k(full, 6, 1.3)
    student_RV, _, _ = _models(torch.float32, 50, 64)
    shard = VocabShard.of(_mine(student_RV, partition), partition, 1.3)
    return [teacher.ids_RK, teacher.top_logp_RK, top_k_divergence(shard, teacher, KINDS[2], "tail")]


def test_every_rank_has_the_same_answer_at_every_size(worlds: Worlds) -> None:
    (expected,) = worlds(1).run(_one_answer)
    for ranks in (2, 4):
        for ids, logp, value in worlds(ranks).run(_one_answer):
            assert torch.equal(ids, expected[0])
            torch.testing.assert_close(logp, expected[1])
            torch.testing.assert_close(value, expected[2])
