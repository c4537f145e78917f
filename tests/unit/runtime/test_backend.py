"""What a machine cannot run is refused with a reason, before anything starts."""

from __future__ import annotations

import pytest
import torch

from megatron_distill.errors import ConfigError
from megatron_distill.runtime.backend import DEVICE, CpuBackend, choose
from megatron_distill.runtime.mesh import ParallelSizes, zigzag_rows
from megatron_distill.runtime.precision import Fp8, Precision
from megatron_distill.runtime.start import start


def test_fp8_is_refused_on_a_cpu() -> None:
    (refusal,) = CpuBackend().refusals(ParallelSizes(), Precision(dtype="bf16", fp8=Fp8()))
    assert "TransformerEngine" in refusal
    assert CpuBackend().refusals(ParallelSizes(), Precision(dtype="bf16")) == []


def test_fp8_needs_bf16_and_a_possible_recipe() -> None:
    with pytest.raises(ValueError, match="dtype=bf16"):
        Precision(fp8=Fp8())
    with pytest.raises(ValueError, match="delayed"):
        Fp8(recipe="delayed", first_last_layers_bf16=True)


def test_a_world_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="= 2 ranks, but 3 were started"), start(ParallelSizes(tp=2), Precision()):
        pass


@pytest.mark.parametrize("sizes", [{"tp": 0}, {"pp": -1}, {"sequence_parallel": True}])
def test_impossible_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1|needs tp > 1"):
        ParallelSizes(**sizes)


def test_zigzag_shares_every_sequence_evenly() -> None:
    cu_seqlens = torch.tensor([0, 8, 12], dtype=torch.int32)
    shares = [zigzag_rows(cu_seqlens, 2, rank).tolist() for rank in range(2)]
    assert shares == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]


def test_the_environment_keeps_a_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(DEVICE, "cpu")
    assert isinstance(choose(), CpuBackend)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(DEVICE, "cuda")
    with pytest.raises(ConfigError, match="sees no GPU"):
        choose()
    monkeypatch.setenv(DEVICE, "tpu")
    with pytest.raises(ConfigError, match="must be cpu or cuda"):
        choose()
