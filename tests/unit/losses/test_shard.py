"""How losses read a shard: lazily, in any type, the gradient in the logits' own place where that is allowed."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from megatron_distill.losses.divergence import divergence, forward_kl, jsd, reverse_kl
from megatron_distill.losses.kinds import Clip, Divergence
from megatron_distill.losses.vocab import entropy, logprob, logprob_and_entropy
from megatron_distill.types import VocabPartition, VocabShard

ROWS, WIDTH, VALID = 5, 24, 19
PARTITION = VocabPartition(start=0, width=WIDTH, valid=VALID, group=None)
IDS = torch.tensor([0, 3, 18, 7, 7])


def _logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(ROWS, WIDTH) * 3).to(dtype).requires_grad_()


def _teacher(dtype: torch.dtype = torch.float32) -> VocabShard:
    return VocabShard.of(_logits(dtype).detach(), PARTITION, 1.3)


def _shard(logits: Tensor, disposable: bool) -> VocabShard:
    return VocabShard.of(logits, PARTITION, 1.3, disposable=disposable)


LOSSES = {
    "logprob": lambda shard, teacher: logprob(shard, IDS),
    "entropy": lambda shard, teacher: entropy(shard),
    "both": lambda shard, teacher: torch.stack(logprob_and_entropy(shard, IDS)).sum(0),
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": lambda shard, teacher: jsd(shard, teacher, 0.3),
    "clipped": lambda shard, teacher: divergence(shard, teacher, Divergence("forward_kl"), clip=Clip(high=0.02)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_disposable_shards_gradient_lies_where_its_logits_were(name: str, dtype: torch.dtype) -> None:
    logits, teacher = _logits(dtype), _teacher(dtype)
    upstream = torch.randn(ROWS)
    value = LOSSES[name](_shard(logits, False), teacher)
    (expected,) = torch.autograd.grad(value, logits, upstream)
    assert expected.dtype == dtype
    assert not expected[:, VALID:].any()
    before = teacher.logits_Rv.clone()
    (found,) = torch.autograd.grad(LOSSES[name](_shard(logits, True), teacher), logits, upstream)
    assert found.data_ptr() == logits.data_ptr()
    assert torch.equal(found, expected)
    assert torch.equal(teacher.logits_Rv, before)


def test_the_last_reader_of_a_shard_overwrites_it_and_no_other() -> None:
    logits, teacher = _logits(), _teacher()
    weights = torch.randn(3, ROWS)

    def total(shard: VocabShard) -> Tensor:
        parts = [forward_kl(shard, teacher), jsd(shard, teacher, 0.5), logprob(shard, IDS)]
        # Not a part of the loss: its graph is gone, and nobody waits for it.
        logprob_and_entropy(shard, IDS)[1].detach()
        return (torch.stack(parts) * weights).sum()

    (expected,) = torch.autograd.grad(total(_shard(logits, False)), logits)
    place = logits.data_ptr()
    shard = _shard(logits, True)
    value = total(shard)
    gc.collect()
    assert len(shard.readers) == 3
    (found,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(found, expected)
    assert not shard.readers
    # The sum of three gradients may be a new tensor; the logits are one of them by now.
    assert logits.data_ptr() == place
    assert logits.detach()[:, :VALID].sum(-1).abs().max() < 1e-5


def test_a_reader_that_is_still_waiting_keeps_the_logits() -> None:
    logits, teacher = _logits(), _teacher()
    shard = _shard(logits, True)
    first, second = forward_kl(shard, teacher), reverse_kl(shard, teacher)
    before = logits.detach().clone()
    torch.autograd.grad(first.sum(), logits)
    assert torch.equal(logits, before)
    (expected,) = torch.autograd.grad(reverse_kl(_shard(before.requires_grad_(), False), teacher).sum(), before)
    (found,) = torch.autograd.grad(second.sum(), logits)
    assert torch.equal(found, expected)


def test_a_second_backward_pass_over_overwritten_logits_is_refused() -> None:
    logits, teacher = _logits(), _teacher()
    value = forward_kl(_shard(logits, True), teacher).sum()
    torch.autograd.grad(value, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, logits)


def test_a_teacher_of_the_same_memory_is_not_overwritten() -> None:
    logits = _logits()
    before = logits.detach().clone()
    teacher = VocabShard.of(logits.detach(), PARTITION, 2.0)
    (found,) = torch.autograd.grad(forward_kl(_shard(logits, True), teacher).sum(), logits)
    assert found.data_ptr() != logits.data_ptr()
    assert torch.equal(logits, before)


def test_without_grad_nobody_reads_later() -> None:
    shard = _shard(_logits(), True)
    with torch.no_grad():
        forward_kl(shard, _teacher())
    assert not shard.readers


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_give_no_rows(name: str) -> None:
    logits = torch.empty(0, WIDTH, requires_grad=True)
    teacher = VocabShard.of(torch.empty(0, WIDTH), PARTITION)
    ids = {"logprob": lambda s, t: logprob(s, IDS[:0]), "both": lambda s, t: logprob_and_entropy(s, IDS[:0])[1]}
    value = ids.get(name, LOSSES[name])(_shard(logits, True), teacher)
    value.sum().backward()
    assert value.shape == (0,)
    assert logits.grad is not None
    assert logits.grad.shape == (0, WIDTH)


def test_two_readers_of_no_rows() -> None:
    """All empty tensors are at the same address, which is no reason to take them for one."""
    logits = torch.empty(0, WIDTH, requires_grad=True)
    shard, teacher = _shard(logits, True), VocabShard.of(torch.empty(0, WIDTH), PARTITION)
    (forward_kl(shard, teacher) + jsd(shard, teacher, 0.5)).sum().backward()
    assert logits.grad is not None


def test_a_likely_ids_gradient_is_exact_in_bf16() -> None:
    """q = 1 - 1e-4 or so: rounding q to bf16 before it is taken from 1 would leave nothing."""
    logits = torch.zeros(1, WIDTH, dtype=torch.bfloat16)
    logits[0, 4] = 12.0
    logits.requires_grad_()
    shard = VocabShard.of(logits, PARTITION)
    (found,) = torch.autograd.grad(logprob(shard, torch.tensor([4])).sum(), logits)
    expected = 1.0 - logits.detach()[0, :VALID].double().softmax(-1)[4]
    assert found[0, 4].item() == pytest.approx(expected.item(), rel=5e-3)


def test_scaled_logits_are_wide_and_have_no_padding() -> None:
    logits = _logits(torch.bfloat16)
    scaled = _shard(logits, False).scaled_Rv()
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled[:, :VALID], logits[:, :VALID].float() / 1.3)
    assert (scaled[:, VALID:] == float("-inf")).all()


def test_a_shard_refuses_other_columns_and_temperatures() -> None:
    with pytest.raises(ValueError, match="the partition holds 24"):
        VocabShard.of(torch.zeros(1, 23), PARTITION)
    with pytest.raises(ValueError, match="temperature=0"):
        VocabShard.of(torch.zeros(1, 24), PARTITION, 0.0)
