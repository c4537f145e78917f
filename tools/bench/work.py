"""The work that methods are compared on: shapes, inputs, and what float64 says of loss and gradient.

Inputs are random logits of a student and of a teacher near it, rounded to the dtype of the shape before anybody sees
them, so that all methods and the reference get the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_distill.types import TopK

TOP_K = 64
BETA = 0.5
ENTROPY_WEIGHT = -0.7
"""Log-prob and entropy become one number per row with it, so that both get a gradient."""
_REFERENCE_ROWS = 64

type Rows = Callable[..., Tensor]
"""Student logits, teacher logits, ids, top-k of some rows -> one loss per row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How much work."""

    rows: int
    vocab: int
    dtype: str = "float32"
    hidden: int = 0
    """Of the student's output layer; 0: the work begins at the logits."""
    teacher_hidden: int = 0
    chunk: int = 0

    @property
    def name(self) -> str:
        """As tables show it."""
        width = f"{self.rows} x {self.vocab} {self.dtype}"
        return f"{width}, H {self.hidden}/{self.teacher_hidden}, chunk {self.chunk}" if self.hidden else width

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the inputs."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    @property
    def copy_bytes(self) -> int:
        """One [T, V] in fp32, the unit of memory figures."""
        return self.rows * self.vocab * 4


@dataclass(frozen=True, slots=True)
class Expected:
    """Loss per row in float64, and the gradients of the sum of all rows, kept in fp32."""

    loss_R: Tensor
    gradients: tuple[Tensor, ...]


class Logits:
    """Inputs at the logits. `student_RV` is what methods read and may overwrite; `restore` puts it back."""

    def __init__(self, shape: Shape, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(1)

        def draw() -> Tensor:
            return torch.randn(shape.rows, shape.vocab, generator=generator, device=device)

        clean_RV = draw().mul_(3.0)
        self.teacher_RV = draw().mul_(0.7).add_(clean_RV).to(shape.torch_dtype)
        self._clean_RV = clean_RV.to(shape.torch_dtype)
        self.student_RV = self._clean_RV.clone().requires_grad_()
        self.ids_R = torch.randint(shape.vocab, (shape.rows,), generator=generator, device=device)
        values_RK, ids_RK = self.teacher_RV.float().topk(TOP_K, dim=-1)
        logsumexp_R1 = self.teacher_RV.float().logsumexp(-1, keepdim=True)
        self.top_k = TopK(logp_R=values_RK[:, 0], ids_RK=ids_RK, top_logp_RK=values_RK - logsumexp_R1)

    def restore(self) -> None:
        """The student's logits as they were at first."""
        with torch.no_grad():
            self.student_RV.copy_(self._clean_RV)

    def expected(self, loss: str) -> Expected:
        """By plain autograd in float64, some rows at a time."""
        losses, gradients = [], []
        for rows in torch.arange(self.ids_R.numel()).split(_REFERENCE_ROWS):
            student = self._clean_RV[rows].double().requires_grad_()
            teacher = self.teacher_RV[rows].double()
            top_k = (self.top_k.ids_RK[rows], self.top_k.top_logp_RK[rows].double())
            value_R = REFERENCES[loss](student, teacher, self.ids_R[rows], top_k)
            (gradient,) = torch.autograd.grad(value_R.sum(), student)
            losses.append(value_R.detach())
            gradients.append(gradient.float())
        return Expected(torch.cat(losses), (torch.cat(gradients),))


class Hidden:
    """Inputs before the output layer: hidden states and output weights of both models."""

    def __init__(self, shape: Shape, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(1)

        def draw(rows: int, columns: int, scale: float) -> Tensor:
            drawn = torch.randn(rows, columns, generator=generator, device=device)
            return drawn.mul_(scale).to(shape.torch_dtype)

        self.shape = shape
        self.hidden_RH = draw(shape.rows, shape.hidden, 1.0).requires_grad_()
        self.weight_VH = draw(shape.vocab, shape.hidden, 2.0 * shape.hidden**-0.5).requires_grad_()
        self.teacher_RH = draw(shape.rows, shape.teacher_hidden, 1.0)
        self.teacher_VH = draw(shape.vocab, shape.teacher_hidden, 2.0 * shape.teacher_hidden**-0.5)

    def expected(self, loss: str) -> Expected:
        """By plain autograd in float64, some rows at a time."""
        weight, teacher_weight = self.weight_VH.detach().double().requires_grad_(), self.teacher_VH.double()
        losses, of_hidden, of_weight = [], [], torch.zeros_like(weight)
        for rows in torch.arange(self.shape.rows).split(_REFERENCE_ROWS):
            hidden = self.hidden_RH.detach()[rows].double().requires_grad_()
            teacher = self.teacher_RH[rows].double() @ teacher_weight.t()
            value_R = REFERENCES[loss](hidden @ weight.t(), teacher, None, None)
            one, other = torch.autograd.grad(value_R.sum(), (hidden, weight))
            losses.append(value_R.detach())
            of_hidden.append(one.float())
            of_weight.add_(other)
        return Expected(torch.cat(losses), (torch.cat(of_hidden), of_weight.float()))


def _forward_kl(student: Tensor, teacher: Tensor, *_: object) -> Tensor:
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def _reverse_kl(student: Tensor, teacher: Tensor, *_: object) -> Tensor:
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    return (logq.exp() * (logq - logp)).sum(-1)


def _jsd(student: Tensor, teacher: Tensor, *_: object) -> Tensor:
    p, q = teacher.softmax(-1), student.softmax(-1)
    logm = (BETA * p + (1 - BETA) * q).log()
    return BETA * (p * (p.log() - logm)).sum(-1) + (1 - BETA) * (q * (q.log() - logm)).sum(-1)


def _logprob(student: Tensor, _: Tensor, ids: Tensor, __: object) -> Tensor:
    return student.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)


def _logprob_entropy(student: Tensor, _: Tensor, ids: Tensor, __: object) -> Tensor:
    logq = student.log_softmax(-1)
    entropy = -(logq.exp() * logq).sum(-1)
    return logq.gather(-1, ids[:, None]).squeeze(-1) + ENTROPY_WEIGHT * entropy


def _top_k(student: Tensor, _: Tensor, __: Tensor, top_k: tuple[Tensor, Tensor]) -> Tensor:
    ids, logp = top_k
    logq = student.log_softmax(-1)
    top = logq.gather(-1, ids)
    # of the columns outside, not 1 minus those inside
    outside = logq.scatter(-1, ids, float("-inf")).logsumexp(-1)
    rest = 1 - logp.exp().sum(-1)
    return (logp.exp() * (logp - top)).sum(-1) + rest * (rest.log() - outside)


REFERENCES: dict[str, Rows] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "logprob": _logprob,
    "logprob_entropy": _logprob_entropy,
    "top_k": _top_k,
}
