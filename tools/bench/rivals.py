"""What ours is compared with: the code that anybody would write first, its compiled form, and released libraries.

TRL and Liger are not dependencies of this project. `tools/bench/setup.sh` puts them where `BESIDE` says; their code
runs here as it was released.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tools.bench.work import BETA, ENTROPY_WEIGHT, Hidden, Logits

BESIDE = Path(__file__).parents[2] / ".tools" / "bench"
"""Packages for the bench only, beside the environment: nothing else here finds them."""

type LogitLoss = Callable[[Logits], Tensor]
"""One loss per row, or the sum over rows; carries the gradient of `student_RV`."""


def versions() -> dict[str, str]:
    """Of the libraries compared with."""
    here = {one.name: one.version for one in metadata.distributions(path=[str(BESIDE)])}
    return {name: here[name] for name in sorted(here)} | {"megatron-core": metadata.version("megatron-core")}


def naive_forward_kl(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    logq, logp = F.log_softmax(student_RV.float(), -1), F.log_softmax(teacher_RV.float(), -1)
    return F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)


def naive_reverse_kl(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    logq, logp = F.log_softmax(student_RV.float(), -1), F.log_softmax(teacher_RV.float(), -1)
    return F.kl_div(logp, logq, reduction="none", log_target=True).sum(-1)


def naive_jsd(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """With the mixture of probabilities, the fastest way to write it: NaN where both of them underflow."""
    logq, logp = F.log_softmax(student_RV.float(), -1), F.log_softmax(teacher_RV.float(), -1)
    q_RV, p_RV = logq.exp(), logp.exp()
    logm = (BETA * p_RV + (1 - BETA) * q_RV).log()
    return (BETA * p_RV * (logp - logm) + (1 - BETA) * q_RV * (logq - logm)).sum(-1)


def naive_logprob(student_RV: Tensor, ids_R: Tensor) -> Tensor:
    return F.log_softmax(student_RV.float(), -1).gather(-1, ids_R[:, None]).squeeze(-1)


def naive_logprob_entropy(student_RV: Tensor, ids_R: Tensor) -> Tensor:
    logq = F.log_softmax(student_RV.float(), -1)
    return logq.gather(-1, ids_R[:, None]).squeeze(-1) - ENTROPY_WEIGHT * (logq.exp() * logq).sum(-1)


def naive_top_k(student_RV: Tensor, ids_RK: Tensor, top_logp_RK: Tensor) -> Tensor:
    logq_RK = F.log_softmax(student_RV.float(), -1).gather(-1, ids_RK)
    p_RK = top_logp_RK.exp()
    rest_p_R, rest_q_R = torch.log1p(-p_RK.sum(-1)), torch.log1p(-logq_RK.exp().sum(-1))
    return (p_RK * (top_logp_RK - logq_RK)).sum(-1) + rest_p_R.exp() * (rest_p_R - rest_q_R)


_NAIVE: dict[str, Callable[..., Tensor]] = {
    "forward_kl": naive_forward_kl,
    "reverse_kl": naive_reverse_kl,
    "jsd": naive_jsd,
    "logprob": naive_logprob,
    "logprob_entropy": naive_logprob_entropy,
    "top_k": naive_top_k,
}


def naive(loss: str, compiled: bool) -> LogitLoss:
    """What one writes first, with plain autograd; or `torch.compile` of it."""
    function = torch.compile(_NAIVE[loss], dynamic=False) if compiled else _NAIVE[loss]
    if loss == "top_k":
        return lambda inputs: function(inputs.student_RV, inputs.top_k.ids_RK, inputs.top_k.top_logp_RK)
    if loss.startswith("logprob"):
        return lambda inputs: function(inputs.student_RV, inputs.ids_R)
    return lambda inputs: function(inputs.student_RV, inputs.teacher_RV)


@cache
def trl_function() -> Callable[..., Tensor]:
    """TRL's `GKDTrainer.generalized_jsd_loss`, compiled from its installed source.

    The module it stands in imports trainers, accelerate and half of transformers; the function needs torch only.
    """
    path = BESIDE / "trl" / "experimental" / "gkd" / "gkd_trainer.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "generalized_jsd_loss":
            node.decorator_list.clear()  # it is a static method there
            names: dict[str, Any] = {"torch": torch, "F": F}
            exec(compile(ast.Module([node], []), str(path), "exec"), names)
            found: Callable[..., Tensor] = names[node.name]
            return found
    raise LookupError(f"no generalized_jsd_loss in {path.name} of this TRL")


def trl(loss: str) -> LogitLoss:
    """TRL's generalised JSD in fp32, as autocast hands it its logits; in bf16 it is off by tens of percent."""
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETA}[loss]
    function = trl_function()
    return lambda inputs: function(
        inputs.student_RV.float(), inputs.teacher_RV.float(), beta=beta, temperature=1.0, reduction="sum"
    )


def megatron_cross_entropy(fused: bool) -> LogitLoss:
    """Megatron-Core's vocabulary-parallel cross entropy; the log-prob is minus that. It overwrites fp32 logits.

    `fused` is the variant with compiled parts and a gradient that is rounded to bf16, whatever the logits are.
    """
    assert dist.is_initialized(), "Megatron-Core's cross entropy needs a process group"
    if fused:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy as function
    else:
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy as function

    def loss(inputs: Logits) -> Tensor:
        # sequence first, then batch, as in Megatron
        found: Tensor = function(inputs.student_RV[:, None], inputs.ids_R[:, None], tp_group=dist.group.WORLD)
        return -found.squeeze(1)

    return loss


@cache
def _liger_function() -> Any:
    if str(BESIDE) not in sys.path:
        sys.path.append(str(BESIDE))  # last: nothing there may stand in for what is installed
    return importlib.import_module("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction


def liger(loss: str, compiled: bool) -> Callable[[Hidden], Tensor]:
    """Liger's chunked fused-linear distillation loss without its hard part: the sum over rows.

    Its beta = 0 is KL(teacher || student). It divides by the number of rows, which is undone.
    """
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETA}[loss]
    function = _liger_function()

    def of(inputs: Hidden) -> Tensor:
        models = (inputs.hidden_RH, inputs.weight_VH, inputs.teacher_RH, inputs.teacher_VH)
        rows = inputs.shape.rows
        target_R = torch.zeros(rows, dtype=torch.long, device=inputs.hidden_RH.device)
        # no biases; weights of the hard and the soft loss; ignored id; temperature
        mean: Tensor = function.apply(
            *models, target_R, None, None, 0.0, 1.0, beta, -100, 1.0, compiled, inputs.shape.chunk, False
        )
        return mean * rows

    return of


def naive_linear(loss: str) -> Callable[[Hidden], Tensor]:
    """Both output layers at once, then the naive loss."""

    def of(inputs: Hidden) -> Tensor:
        with torch.no_grad():
            teacher_RV = inputs.teacher_RH @ inputs.teacher_VH.t()
        return _NAIVE[loss](inputs.hidden_RH @ inputs.weight_VH.t(), teacher_RV)

    return of


def gemm_floor(inputs: Hidden) -> tuple[Tensor, Tensor]:
    """Nothing but the matrix products that any fused-linear loss has to do, in the same chunks: three, and one."""
    hidden_RH, weight_VH = inputs.hidden_RH.detach(), inputs.weight_VH.detach()
    hidden_grad, weight_grad = torch.empty_like(hidden_RH), torch.zeros_like(weight_VH)
    for rows in torch.arange(inputs.shape.rows).split(inputs.shape.chunk):
        one = slice(int(rows[0]), int(rows[-1]) + 1)
        student_CV = hidden_RH[one] @ weight_VH.t()
        teacher_CV = inputs.teacher_RH[one] @ inputs.teacher_VH.t()
        torch.mm(student_CV, weight_VH, out=hidden_grad[one])
        weight_grad.addmm_(student_CV.t(), hidden_RH[one])
        del student_CV, teacher_CV
    return hidden_grad, weight_grad
