"""The pinned Megatron-Core still has everything that the CPU adaptation stands in for."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from megatron_distill.runtime import megatron_cpu

SYMBOLS = {
    "megatron.core.optimizer": ("Adam", "USING_PYTORCH_OPTIMIZER"),
    "megatron.core.optimizer.distrib_optimizer": ("Adam", "HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER"),
    "megatron.core.tensor_parallel.random": ("_get_cuda_rng_state", "_set_cuda_rng_state"),
    "megatron.core.dist_checkpointing.strategies.filesystem_async": ("_results_queue",),
}
LAYER_PARTS = "core_attention", "q_layernorm", "k_layernorm"


def test_every_symbol_still_exists() -> None:
    code = (
        "from megatron_distill.runtime import megatron_cpu; megatron_cpu.install();"
        "import importlib;"
        f"[getattr(importlib.import_module(m), n) for m, names in {SYMBOLS!r}.items() for n in names];"
        "from megatron.core.transformer.attention import SelfAttentionSubmodules as S;"
        f"assert set({LAYER_PARTS!r}) <= set(S.__dataclass_fields__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_torch_cuda_has_what_is_stood_in_for() -> None:
    cuda = importlib.import_module("torch.cuda")
    assert all(hasattr(cuda, name) for name in megatron_cpu.TORCH_CUDA)


def test_cuda_names_mean_the_cpu_only_inside() -> None:
    with megatron_cpu.cuda_names_on_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, pin_memory=True).cuda().to("cuda").device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(2).type() == "torch.FloatTensor"
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(2, device="cuda")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_steps_like_torch(weight_decay: float) -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 11)) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    adam, torch_adam = megatron_cpu.CpuAdam([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(5):
        for weight in (ours, theirs):
            weight.grad = torch.sin(weight.detach() * 3 + step)
        adam.step()
        torch_adam.step()
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert adam.param_groups[0]["step"] == 5
