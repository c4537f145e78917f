"""Who is compared with whom, and one comparison: equal work first, then times and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.losses import backend
from megatron_distill.runtime.backend import choose
from tools.bench import ours, rivals
from tools.bench.equal import Errors, errors
from tools.bench.machine import available_gib
from tools.bench.memory import high_water, peak_beyond_inputs
from tools.bench.timing import Method, interleave, stopwatch
from tools.bench.work import Expected, Hidden, Logits, Shape

OURS, EAGER, INTO_BUFFER = "ours", "ours, eager", "ours, dW into main_grad"
NAIVE, COMPILED = "naive", "naive, torch.compile"
TRL, MEGATRON, MEGATRON_FUSED = "TRL", "Megatron-Core", "Megatron-Core, fused"
LIGER, LIGER_COMPILED, FLOOR = "Liger, eager", "Liger, torch.compile", "GEMM floor"

_EVERYBODY_BELOW = 2**16
"""Ids up to which fused-linear losses are measured by everybody; beyond, a run of one method takes ten seconds."""

LOGIT_LOSSES = ("forward_kl", "reverse_kl", "jsd", "logprob", "logprob_entropy", "top_k")
LINEAR_LOSSES = ("forward_kl", "jsd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A method before it is let in."""

    name: str
    run: Callable[[], tuple[Tensor, tuple[Tensor, ...]]]
    """Loss, per row or summed, and the gradients of its sum."""
    prepare: Callable[[], None]
    copies: float = 1.0
    """About how many [T, V] in fp32 it needs beyond its inputs: not started where they would not fit."""
    judged: bool = True
    """False: it is no loss, and nothing is to be checked."""


def contenders(shape: Shape, loss: str, inputs: Logits | Hidden) -> list[Contender]:
    """Everybody who has this loss, ours first."""
    if isinstance(inputs, Hidden):
        return _linear_contenders(loss, inputs)
    columns = ours.partition(shape.vocab)
    mine = ours.logit_loss(loss, columns)
    found = [_on_logits(OURS, mine, inputs, 0.1), _on_logits(EAGER, mine, inputs, 1.0, "eager")]
    full = loss in ("forward_kl", "reverse_kl", "jsd")
    found.append(_on_logits(NAIVE, rivals.naive(loss, compiled=False), inputs, 15.0 if loss == "jsd" else 7.0))
    found.append(_on_logits(COMPILED, rivals.naive(loss, compiled=True), inputs, 3.0))
    if full:
        found.append(_on_logits(TRL, rivals.trl(loss), inputs, 16.0 if loss == "jsd" else 8.0))
    if loss == "logprob":
        found.append(_on_logits(MEGATRON, rivals.megatron_cross_entropy(fused=False), inputs, 2.0))
        found.append(_on_logits(MEGATRON_FUSED, rivals.megatron_cross_entropy(fused=True), inputs, 3.0))
    return found


def _on_logits(
    name: str, loss: Callable[[Logits], Tensor], inputs: Logits, copies: float, kind: backend.Name = "compiled"
) -> Contender:
    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        found = loss(inputs)
        return found.detach(), torch.autograd.grad(found.sum(), inputs.student_RV)

    def prepare() -> None:
        backend.use(kind)
        inputs.restore()

    return Contender(name=name, run=run, prepare=prepare, copies=copies)


def _linear_contenders(loss: str, inputs: Hidden) -> list[Contender]:
    chunk = inputs.shape.chunk / inputs.shape.rows
    found = [
        _on_hidden(OURS, ours.linear(loss), inputs, 3 * chunk),
        _on_hidden(LIGER_COMPILED, rivals.liger(loss, compiled=True), inputs, 4 * chunk),
    ]
    if inputs.shape.vocab <= _EVERYBODY_BELOW:
        found.append(_into_buffer(loss, inputs, 3 * chunk))
    if inputs.shape.vocab <= _EVERYBODY_BELOW and chunk < 1:
        found.append(_on_hidden(EAGER, ours.linear(loss), inputs, 5 * chunk, "eager"))
        found.append(_on_hidden(LIGER, rivals.liger(loss, compiled=False), inputs, 15 * chunk))
        found.append(_on_hidden(NAIVE, rivals.naive_linear(loss), inputs, 16.0))
    floor = Contender(
        name=FLOOR,
        run=lambda: (torch.zeros(()), rivals.gemm_floor(inputs)),
        prepare=lambda: None,
        copies=2 * chunk,
        judged=False,
    )
    return [*found, floor]


def _on_hidden(
    name: str, loss: Callable[[Hidden], Tensor], inputs: Hidden, copies: float, kind: backend.Name = "compiled"
) -> Contender:
    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        found = loss(inputs)
        return found.detach(), torch.autograd.grad(found.sum(), (inputs.hidden_RH, inputs.weight_VH))

    return Contender(name=name, run=run, prepare=lambda: backend.use(kind), copies=copies)


def _into_buffer(loss: str, inputs: Hidden, copies: float) -> Contender:
    """Ours, where a buffer for the weight's gradient is there already."""
    buffer_VH = torch.zeros_like(inputs.weight_VH, dtype=torch.float32, requires_grad=False)
    function = ours.linear(loss, add_to=buffer_VH)

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        found = function(inputs)
        return found.detach(), (*torch.autograd.grad(found, inputs.hidden_RH), buffer_VH)

    def prepare() -> None:
        backend.use("compiled")
        buffer_VH.zero_()

    return Contender(name=INTO_BUFFER, run=run, prepare=prepare, copies=copies)


def admit(
    found: list[Contender], shape: Shape, expected: Expected, room_gib: float | None = None
) -> tuple[list[Contender], dict[str, dict[str, Any]]]:
    """Those that fit into memory and give the loss and the gradient that float64 gives, and what was found of all."""
    admitted: list[Contender] = []
    report: dict[str, dict[str, Any]] = {}
    for one in found:
        room = available_gib() if room_gib is None else room_gib
        need = one.copies * shape.copy_bytes / 2**30
        if need > 0.8 * room:
            report[one.name] = {"refused": f"needs some {need:.0f} GiB, {room:.0f} are free"}
            continue
        off = Errors(0.0, 0.0)
        if one.judged:
            one.prepare()
            loss, gradients = one.run()
            off = errors(loss, gradients, expected)
            del loss, gradients
        refusal = off.refusal(shape.dtype)
        report[one.name] = {"loss_error": off.loss, "gradient_error": off.gradient, "refused": refusal or None}
        if not refusal:
            admitted.append(one)
    return admitted, report


def compare(shape: Shape, loss: str, inputs: Logits | Hidden, rounds: int) -> dict[str, Any]:
    """Errors, then times of all who are admitted."""
    admitted, report = admit(contenders(shape, loss, inputs), shape, inputs.expected(loss))
    methods = [Method(name=one.name, run=one.run, prepare=one.prepare) for one in admitted]
    # each has run once for its errors; seconds of matrix products need no more
    for name, samples in interleave(methods, rounds, stopwatch(), warm_up=0 if shape.hidden else 1).items():
        report[name] |= {"median_ms": samples.median, "best_ms": samples.best, "ms": list(samples.ms)}
    return report


@contextmanager
def alone() -> Iterator[None]:
    """Within, torch.distributed is a world of one, without which Megatron-Core's losses do not run."""
    choose().prepare()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'meet'}", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def weigh(shape: Shape, loss: str, inputs: Logits | Hidden, admitted: set[str]) -> dict[str, Any]:
    """Memory of everybody in `admitted`: exact peaks, and the kernel's word as a cross-check."""
    report: dict[str, Any] = {}
    for one in contenders(shape, loss, inputs):
        if one.name not in admitted or not one.judged:
            continue
        if shape.hidden and shape.vocab > _EVERYBODY_BELOW and one.name != OURS:
            continue  # minutes, for what the smaller shape says already
        one.prepare()
        one.run()  # compilers hold memory of their own while they work
        one.prepare()
        exact = peak_beyond_inputs(one.run)
        one.prepare()
        seen = high_water(one.run)
        report[one.name] = {
            "peak_bytes": exact,
            "peak_copies": exact / shape.copy_bytes,
            "resident_copies": None if seen is None else seen / shape.copy_bytes,
        }
    return report
