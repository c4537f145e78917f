"""The backends give the same numbers, those of float64, whatever the type, temperature, padding and depth of logits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_distill.losses import backend, regions
from megatron_distill.losses.divergence import divergence
from megatron_distill.losses.kinds import Clip, Divergence
from megatron_distill.losses.vocab import logprob, logprob_and_entropy
from megatron_distill.testing.assertions import TOLERANCE, assert_close
from megatron_distill.types import VocabPartition, VocabShard

ROWS, VALID = 6, 1003

COMMON: dict[str, tuple[Divergence, Clip | None]] = {
    "forward_kl": (Divergence("forward_kl"), None),
    "reverse_kl": (Divergence("reverse_kl"), None),
    "jsd": (Divergence("jsd", 0.5), None),
    "clipped": (Divergence("forward_kl"), Clip(high=0.002)),
}
RARE: dict[str, tuple[Divergence, Clip | None]] = {
    "mixed_kl": (Divergence("mixed_kl", 0.3), None),
    "jsd_0.1": (Divergence("jsd", 0.1), None),
    "skew_forward_kl": (Divergence("skew_forward_kl", 0.1), None),
    "skew_reverse_kl": (Divergence("skew_reverse_kl", 0.1), None),
    "total_variation": (Divergence("total_variation"), None),
    "clipped_jsd": (Divergence("jsd", 0.5), Clip(low=0.0, high=0.001)),
    "clipped_reverse_kl": (Divergence("reverse_kl"), Clip(low=-0.001, high=0.001)),
}
KINDS = COMMON | RARE


@pytest.fixture(autouse=True)
def _eager_again() -> Iterator[None]:
    yield
    backend.use("eager")


def _inputs(dtype: torch.dtype, width: int, far: bool, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, upstream gradient; `far`: ids excluded or 300 nats down, in one of them or in both."""
    student, teacher = torch.randn(ROWS, width) * 2, torch.randn(ROWS, width) * 2
    if far:
        column = torch.arange(width)
        student[:, column % 7 == 1] -= 300.0
        teacher[:, column % 5 == 1] -= 300.0
        student[:, column % 11 == 3], teacher[:, column % 11 == 3] = float("-inf"), float("-inf")
    student[:, VALID:], teacher[:, VALID:] = 1e4, float("nan")
    return student.to(device, dtype), teacher.to(device, dtype), torch.randn(ROWS).to(device)


def _value(name: str, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    partition = VocabPartition(start=0, width=logits.shape[-1], valid=VALID, group=None)
    student = VocabShard.of(logits, partition, temperature, disposable=True)
    ids = torch.arange(ROWS, device=logits.device) * 100
    if name == "logprob":
        return logprob(student, ids)
    if name == "logprob_and_entropy":
        logp, entropy = logprob_and_entropy(student, ids)
        return logp - 0.7 * entropy
    kind, clip = KINDS[name]
    return divergence(student, VocabShard.of(teacher, partition, temperature), kind, clip=clip)


def _check(
    name: str, chosen: backend.Name, dtype: torch.dtype, width: int, far: bool, temperature: float, device: str = "cpu"
) -> None:
    student, teacher, upstream = _inputs(dtype, width, far, device)
    wide = student.double().requires_grad_()
    backend.use("eager")
    expected = _value(name, wide, teacher.double(), temperature)
    (expected_gradient,) = torch.autograd.grad(expected, wide, upstream.double())
    backend.use(chosen)
    assert backend.current() == chosen
    logits = student.clone().requires_grad_()
    found = _value(name, logits, teacher, temperature)
    (gradient,) = torch.autograd.grad(found, logits, upstream)
    assert gradient.dtype == dtype
    assert gradient.data_ptr() == logits.data_ptr()
    what = f"{name} on {chosen}, {dtype}, {width} columns, far={far}, T={temperature}"
    assert found.isfinite().all(), what
    assert not gradient[:, VALID:].any(), what
    assert_close(found, expected, f"{what}: value", 1e-4 if dtype == torch.bfloat16 else TOLERANCE[torch.float32])
    # A gradient in bf16 is rounded once, to 8 bits.
    assert_close(gradient, expected_gradient, f"{what}: gradient", 4e-3 if dtype == torch.bfloat16 else None)


EXACT = ["logprob", "logprob_and_entropy", *KINDS]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eager_regions_equal_float64(name: str, dtype: torch.dtype) -> None:
    for width in (VALID, VALID + 21):
        for far in (False, True):
            for temperature in (1.0, 1.3):
                _check(name, "eager", dtype, width, far, temperature)


def test_eager_in_blocks_is_the_same_bit_for_bit() -> None:
    student, teacher, _ = _inputs(torch.float32, VALID, True, "cpu")
    teacher[:, -1] = 0.0
    settings = 1.0, 0.8, "jsd", 0.3, 0.0, 0.001
    rows = torch.rand(7, ROWS)
    found = []
    for elements in (1, 3 * VALID, None):
        eager, out = backend.Eager(elements), student.clone()
        sums = eager.sums(regions.entry_sums, [out, teacher], rows, *settings)
        eager.write(regions.entry_gradient, out, [out, teacher], rows, *settings)
        found.append((sums, out))
    for sums, gradient in found[1:]:
        assert torch.equal(sums, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_a_compiled_divergence_equals_float64() -> None:
    _check("jsd", "compiled", torch.float32, VALID + 21, True, 1.3)
    # Autograd learns that a kernel it did not see has overwritten the logits.
    student, teacher, _ = _inputs(torch.float32, VALID + 21, True, "cpu")
    value = _value("jsd", student.requires_grad_(), teacher, 1.3).sum()
    torch.autograd.grad(value, student, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, student)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_all_compiled_regions_equal_float64(name: str) -> None:
    _check(name, "compiled", torch.float32, VALID + 21, True, 1.3)
    _check(name, "compiled", torch.bfloat16, VALID, False, 1.0)


def test_a_new_number_of_rows_compiles_nothing() -> None:
    """The last chunk of a micro-batch is shorter than the others."""
    backend.use("compiled")
    compiled = torch._dynamo.utils.counters["stats"]
    counts = []
    for rows in (6, 5, 3, 6, 4):
        logits = torch.randn(rows, VALID, requires_grad=True)
        partition = VocabPartition(start=0, width=VALID, valid=VALID, group=None)
        value = logprob(VocabShard.of(logits, partition, 1.3, disposable=True), torch.zeros(rows, dtype=torch.long))
        value.sum().backward()
        counts.append(compiled["unique_graphs"])
    assert counts[1:] == counts[:1] * 4


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of eager, compiled, triton"):
        backend.use("cuda")
    assert backend.current() == "eager"
