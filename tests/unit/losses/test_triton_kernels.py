"""Triton kernels without a GPU: their numbers in Triton's interpreter, and that its compiler takes them for an H100."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.losses.test_backend import EXACT, VALID, _check

# Blocks and splits small enough that a row has several of both.
INTERPRET = """
import sys
import torch
from megatron_distill.losses import triton_kernels
from tests.unit.losses.test_backend import VALID, _check, _inputs, _value
torch.set_num_threads(1)
triton_kernels.BLOCK, triton_kernels.PROGRAMS = 128, 18
for name in sys.argv[1:]:
    torch.manual_seed(0)
    _check(name, "triton", torch.float32, VALID + 21, True, 1.3)
    _check(name, "triton", torch.float32, VALID, False, 1.0)
# Autograd learns that a kernel has overwritten the logits.
student, teacher, _ = _inputs(torch.float32, VALID, False, "cpu")
value = _value("jsd", student.requires_grad_(), teacher, 1.0).sum()
torch.autograd.grad(value, student, retain_graph=True)
try:
    torch.autograd.grad(value, student)
except RuntimeError as error:
    assert "modified by an inplace operation" in str(error)
    print("all", len(sys.argv) - 1)
"""

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_distill.losses import triton_kernels as kernels
numbers = {"scale", "q_scale", "p_scale", "parameter", "low", "high", "constant"}
cases = [
    (kernel, {"ENTROPY": True} if "ENTROPY" in kernel.arg_names else {})
    for kernel in (kernels._model_sums, kernels._pair_sums, kernels._kl_gradient, kernels._softmax_gradient)
] + [
    (kernel, {"KIND": kind, "HAS_LOW": True, "HAS_HIGH": True})
    for kernel in (kernels._entry_sums, kernels._entry_gradient)
    for kind in range(len(kernels._NAMES))
]
for kernel, constants in cases:
    constants = constants | {"BLOCK": kernels.BLOCK}
    types = {"student": "*bf16", "teacher": "*bf16", "logits": "*bf16", "numbers": "*fp32"}
    types["out"] = "*bf16" if "gradient" in kernel.__name__ else "*fp32"
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "fp32" if name in numbers else "i32")
        for name in names
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
    assert made.asm["cubin"]
print("all", len(cases))
"""


def _python(code: str, *arguments: str, interpret: bool) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=Path(__file__).parents[3],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def test_kernels_equal_float64_in_the_interpreter() -> None:
    """One of each kernel; for a clipped entry and its slope there are bounds on either side."""
    names = ["logprob_and_entropy", "mixed_kl", "jsd", "clipped_reverse_kl"]
    assert _python(INTERPRET, *names, interpret=True) == "all 4\n"


@pytest.mark.slow
def test_all_kernels_equal_float64_in_the_interpreter() -> None:
    assert _python(INTERPRET, *EXACT, interpret=True) == f"all {len(EXACT)}\n"


@pytest.mark.slow
def test_all_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    assert _python(COMPILE, interpret=False) == "all 18\n"


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", ["eager", "compiled", "triton"])
@pytest.mark.parametrize("name", EXACT)
def test_backends_equal_float64_on_a_gpu(name: str, chosen: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for far, temperature in ((False, 1.0), (True, 1.3)):
            for width in (VALID, VALID + 21):
                _check(name, chosen, dtype, width, far, temperature, "cuda")
