"""Any cut over tensor- and data-parallel ranks, micro-batches and chunks, on a model small enough to try them all.

The student is a table (an embedding of the input token and of its position, and an output layer), so that rows only
have the right logits if the shift, the packing and the partition are right. Sequences go through the real `pack`,
`prepare`, `bind` and `linear_loss`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.data.packing import pack
from megatron_distill.losses import backend
from megatron_distill.losses.chunk import linear_loss
from megatron_distill.losses.signal import teacher_logprob
from megatron_distill.losses.vocab import logprob_and_entropy, top_k
from megatron_distill.objectives.base import Objective, Scope
from megatron_distill.testing.assertions import relative_error
from megatron_distill.train.step import bind
from megatron_distill.types import (
    Batch,
    Fidelity,
    Full,
    MicroBatch,
    Scored,
    TeacherSignal,
    Token,
    TokenStats,
    TopK,
    VocabPartition,
    VocabShard,
)
from tests.certify.data import SEED, STEP, sequences, whole_step
from tests.certify.settings import Setting

VALID, PADDED, HIDDEN, POSITIONS = 94, 128, 8, 48
"""Over four tensor-parallel ranks, the last one holds nothing but padding."""
ITSELF = "itself"
"""A teacher of this name has the student's own weights."""
WHOLE = 10_000
"""Tokens of a micro-batch that holds everything."""

type Groups = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]
"""Tensor-parallel and data-parallel group of this rank."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a step is cut."""

    tp: int = 1
    dp: int = 1
    tokens_per_micro_batch: int = WHOLE
    chunk_rows: int = 1024
    sequence_multiple: int = 1
    total_multiple: int = 1
    fidelities: tuple[Fidelity, ...] = tuple(Fidelity)
    """What teachers give, of what the objective accepts."""
    dtype: torch.dtype = torch.float32
    backend: backend.Name = "eager"
    """Of the losses. Compiled ones are tried on defaults only: every other number in a setting is compiled anew."""

    @property
    def ranks(self) -> int:
        """World size."""
        return self.tp * self.dp

    def suits(self, setting: Setting) -> bool:
        """Whether this cut is tried with the setting: one that speaks of one micro-batch is not cut further."""
        whole = self.dp == 1 and self.tokens_per_micro_batch == WHOLE
        return (whole or not setting.one_micro_batch) and (self.backend == "eager" or not setting.fields)


RICHEST = (Fidelity.FULL,)
CUTS: Mapping[str, Cut] = {
    "whole": Cut(),
    "whole, fp64": Cut(dtype=torch.float64),
    "whole, compiled losses": Cut(backend="compiled", fidelities=RICHEST),
    "chunks of 4": Cut(chunk_rows=4, fidelities=RICHEST),
    "micro-batches of 24 tokens": Cut(tokens_per_micro_batch=24, fidelities=RICHEST),
    "a micro-batch per sequence, chunks of 3": Cut(tokens_per_micro_batch=1, chunk_rows=3),
    "padded": Cut(tokens_per_micro_batch=32, sequence_multiple=4, total_multiple=16, fidelities=RICHEST),
    "tp=2": Cut(tp=2),
    "tp=2, fp64, chunks of 40": Cut(tp=2, dtype=torch.float64, chunk_rows=40, fidelities=RICHEST),
    "tp=2, micro-batches, chunks of 16, padded": Cut(tp=2, chunk_rows=16, tokens_per_micro_batch=48, total_multiple=8),
    "dp=2": Cut(dp=2, fidelities=RICHEST),
    "dp=2, fp64, micro-batches": Cut(dp=2, dtype=torch.float64, tokens_per_micro_batch=24, fidelities=RICHEST),
    "tp=4": Cut(tp=4),
    "tp=4, micro-batches, chunks of 16": Cut(tp=4, chunk_rows=16, tokens_per_micro_batch=48, fidelities=RICHEST),
    "tp=2 dp=2, micro-batches, chunks of 16, padded": Cut(
        tp=2, dp=2, tokens_per_micro_batch=48, chunk_rows=16, sequence_multiple=2
    ),
    "dp=4, a micro-batch per sequence": Cut(dp=4, tokens_per_micro_batch=1, fidelities=RICHEST),
}
"""By name. A data-parallel rank with fewer sequences than another has micro-batches without rows."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A model without layers; its output layer is padded beyond the vocabulary."""

    token_VH: Tensor
    position_PH: Tensor
    head_pH: Tensor

    @staticmethod
    def draw(seed: int, padded: int, dtype: torch.dtype, spread: float = 1.0) -> Table:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, size: float = 1.0) -> Tensor:
            # Drawn in fp32, so that fp64 has the very same numbers.
            drawn = size * torch.randn(*shape, generator=generator, dtype=torch.float32)
            return drawn.to(dtype).requires_grad_()

        return Table(
            token_VH=normal(VALID, HIDDEN),
            position_PH=normal(POSITIONS, HIDDEN),
            head_pH=normal(padded, HIDDEN, size=spread),
        )

    def hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return torch.tanh(self.token_VH[tokens] + self.position_PH[positions])

    def response_logits(self, tokens: Sequence[int], prompt: int) -> Tensor:
        """One sequence by itself: the logits that predict its response."""
        rows = torch.arange(prompt - 1, len(tokens) - 1)
        return self.hidden(torch.tensor(tokens)[rows], rows) @ self.head_pH[:VALID].T

    def gradients(self) -> dict[str, Tensor]:
        named = {"token": self.token_VH, "position": self.position_PH, "head": self.head_pH}
        return {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in named.items()}


@dataclass(frozen=True, kw_only=True)
class Found:
    """Loss of the whole step, the logged parts of it summed, and gradients by parameter."""

    loss: Tensor
    logged: Tensor
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A setting, its data and the oracle's answer."""

    setting: Setting
    scored: list[Scored]
    found: Found
    scale: float
    """What an error of the loss is relative to."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors of one setting under one cut, one fidelity of its teachers."""

    setting: str
    fidelity: str
    loss: float
    gradient: float


def student_table(dtype: torch.dtype) -> Table:
    """The one that learns."""
    return Table.draw(1, PADDED, dtype)


def teacher_tables(names: Sequence[str], dtype: torch.dtype) -> dict[str, Table]:
    """Teachers are padded otherwise than the student, and otherwise than each other.

    They are less sure of themselves: of 94 ids the 30 that a default top-k leaves out would else have so little
    probability that log(1 - P) of an fp32 signal has few digits.
    """
    return {
        name: student_table(dtype) if name == ITSELF else Table.draw(100 + place, VALID + 3 + place, dtype, spread=0.7)
        for place, name in enumerate(names)
    }


@cache
def table_sequences(data: str) -> list[Scored]:
    """Data for the table model."""
    student = student_table(torch.float64)

    @torch.no_grad()
    def logprobs(tokens: Sequence[int], prompt: int) -> Tensor:
        logits_RV = student.response_logits(tokens, prompt)
        return logits_RV.log_softmax(-1)[torch.arange(len(logits_RV)), torch.tensor(tokens[prompt:])]

    return sequences(data, VALID, logprobs)


def expected(setting: Setting) -> Expected:
    """What the oracle says: sequences one by one, nothing packed, nothing padded, float64."""
    student, scored = student_table(torch.float64), table_sequences(setting.data)

    def rows(model: Table) -> Tensor:
        rollouts = [one.rollout for one in scored]
        return torch.cat(
            [model.response_logits((*one.prompt.tokens, *one.tokens), len(one.prompt.tokens)) for one in rollouts]
        )

    teachers = {name: rows(model) for name, model in teacher_tables(setting.teachers, torch.float64).items()}
    step = whole_step(scored, rows(student), teachers, setting.state)
    loss = setting.oracle(step)
    assert loss.dtype == torch.float64
    assert loss.shape == ()
    loss.backward()
    found = Found(loss=loss.detach(), logged=loss.detach(), gradients=student.gradients())
    assert all(gradient.isfinite().all() for gradient in found.gradients.values()), f"the oracle of {setting}"
    return Expected(setting=setting, scored=scored, found=found, scale=setting.scale(step, loss))


def errors(cuts: Sequence[Cut], answers: Sequence[Expected]) -> list[list[Errors]]:
    """On each rank: for each cut, the errors of every setting with every fidelity that it accepts."""
    groups = {tp: _groups(tp) for tp in sorted({cut.tp for cut in cuts})}
    found = []
    for cut in cuts:
        with _default_dtype(cut.dtype), _backend(cut.backend):
            found.append(
                [
                    _compare(answer, cut_step(answer, cut, fidelity, groups[cut.tp]), fidelity)
                    for answer in answers
                    if cut.suits(answer.setting)
                    for fidelity in _accepted(answer.setting.objective, cut)
                ]
            )
    return found


def _accepted(objective: Objective, cut: Cut) -> list[Fidelity | None]:
    need = objective.needs.teacher
    return [None] if need is None else [one for one in Fidelity if one >= need and one in cut.fidelities]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """In fp64, so that constants such as weights are fp64, too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _backend(name: backend.Name) -> Iterator[None]:
    before = backend.current()
    backend.use(name)
    try:
        yield
    finally:
        backend.use(before)


def _compare(answer: Expected, found: Found, fidelity: Fidelity | None) -> Errors:
    gradient = max(
        (relative_error(one, answer.found.gradients[name]) for name, one in found.gradients.items()), key=_badness
    )
    if found.gradients["head"][VALID:].any():
        gradient = math.inf  # padding columns must not move at all
    losses = (scaled_error(one, answer.found.loss, answer.scale) for one in (found.loss, found.logged))
    return Errors(
        setting=str(answer.setting),
        fidelity="" if fidelity is None else fidelity.name.lower(),
        loss=max(losses, key=_badness),
        gradient=gradient,
    )


def scaled_error(actual: Tensor, wanted: Tensor, scale: float) -> float:
    """|actual - wanted| / scale; the plain error where all is 0."""
    error = abs(float(actual) - float(wanted))
    return error / scale if scale else error


def _badness(error: float) -> float:
    return math.inf if math.isnan(error) else error


def cut_step(answer: Expected, cut: Cut, fidelity: Fidelity | None, groups: Groups) -> Found:
    """The same step as a training run would take it, on this rank's part; summed over ranks at the end."""
    objective, (tp_group, dp_group) = answer.setting.objective, groups
    width = PADDED // cut.tp
    tp_rank, dp_rank = dist.get_rank() % cut.tp, dist.get_rank() // cut.tp
    partition = VocabPartition(start=tp_rank * width, width=width, valid=VALID, group=tp_group)
    batch = pack(
        answer.scored,
        dp_rank=dp_rank,
        dp_size=cut.dp,
        tokens_per_micro_batch=cut.tokens_per_micro_batch,
        sequence_multiple=cut.sequence_multiple,
        total_multiple=cut.total_multiple,
        device=torch.device("cpu"),
        version=0,
    )
    student = student_table(cut.dtype)
    teachers = teacher_tables(answer.setting.teachers, cut.dtype)
    signals = {
        name: tuple(_signal(model, micro, partition, objective, fidelity) for micro in batch.micro)
        for name, model in teachers.items()
    }
    scope = Scope(seed=SEED, step=STEP, data_group=dp_group)
    stats = _stats(student, signals, batch, partition, objective)
    plan, _ = objective.prepare(stats, batch, scope, answer.setting.state)
    total, logged = _backward(student, batch, bind(objective, signals, plan, batch, partition), partition, cut)
    gradients = {name: scope.total(gradient) for name, gradient in student.gradients().items()}
    gradients["head"] = gradients["head"].clone()
    if cut.tp > 1:
        dist.all_reduce(gradients["head"], group=tp_group)
    assert not any(one.requires_grad and one.grad is not None for model in teachers.values() for one in _tensors(model))
    return Found(loss=scope.total(total), logged=scope.total(logged), gradients=gradients)


def _tensors(model: Table) -> tuple[Tensor, ...]:
    return model.token_VH, model.position_PH, model.head_pH


@torch.no_grad()
def _stats(
    student: Table,
    signals: Mapping[str, tuple[TeacherSignal, ...]],
    batch: Batch,
    partition: VocabPartition,
    objective: Objective,
) -> TokenStats:
    """What the trainer would fill in before the backward pass."""
    needs = objective.needs
    student_logp: tuple[Tensor, ...] | None = None
    entropy: tuple[Tensor, ...] | None = None
    if needs.student_logprobs == "rollout":
        student_logp = tuple(micro.rollout_logp_R for micro in batch.micro)
    elif needs.student_logprobs == "recompute":
        mine = slice(partition.start, partition.start + partition.width)
        both = []
        for micro in batch.micro:
            hidden_RH = student.hidden(micro.input_T, micro.position_T)[micro.response_R]
            shard = VocabShard.of(hidden_RH @ student.head_pH[mine].T, partition, objective.temperature)
            both.append(logprob_and_entropy(shard, micro.target_R))
        student_logp = tuple(logp_R for logp_R, _ in both)
        entropy = tuple(entropy_R for _, entropy_R in both) if needs.entropy else None
    teacher_logp = {
        name: tuple(
            teacher_logprob(signal, micro.target_R, objective.temperature)
            for signal, micro in zip(signals[name], batch.micro, strict=True)
        )
        for name in (signals if needs.teacher_logprobs else ())
    }
    return TokenStats(student_logp=student_logp, entropy=entropy, teacher_logp=teacher_logp)


def _backward(
    student: Table, batch: Batch, loss: Callable[..., Any], partition: VocabPartition, cut: Cut
) -> tuple[Tensor, Tensor]:
    """Leave gradients in `student`: whole ones for the embeddings, this rank's rows of the output layer's."""
    total, logged = torch.zeros(()), torch.zeros(())
    mine = slice(partition.start, partition.start + partition.width)
    for index, micro in enumerate(batch.micro):
        hidden_RH = student.hidden(micro.input_T, micro.position_T)[micro.response_R]
        leaf_RH = hidden_RH.detach().requires_grad_()
        scalar, parts = linear_loss(
            leaf_RH,
            student.head_pH[mine],
            lambda logits, rows, at=index: loss(logits, at, rows),
            cut.chunk_rows,
            valid=partition.valid_width,
        )
        scalar.backward()
        assert leaf_RH.grad is not None
        if cut.tp > 1 and micro.rows:
            dist.all_reduce(leaf_RH.grad, group=partition.group)
        hidden_RH.backward(leaf_RH.grad)
        total = total + scalar.detach()
        logged = logged + torch.stack(list(parts.values())).sum()
    return total, logged


@torch.no_grad()
def _signal(
    model: Table, micro: MicroBatch, partition: VocabPartition, objective: Objective, fidelity: Fidelity | None
) -> TeacherSignal:
    hidden_RH = model.hidden(micro.input_T, micro.position_T)[micro.response_R]
    head_vH = torch.full((partition.width, HIDDEN), 40.0, dtype=hidden_RH.dtype)
    theirs = model.head_pH[partition.start : partition.start + partition.width]
    head_vH[: len(theirs)] = theirs
    full = Full(hidden_RH=hidden_RH, head_vH=head_vH, partition=partition)
    if fidelity == Fidelity.FULL:
        return full
    logp_R = teacher_logprob(full, micro.target_R, objective.temperature)
    if fidelity == Fidelity.TOKEN:
        return Token(logp_R=logp_R)
    # more than is asked for: the objective cuts
    ids_RK, top_logp_RK = top_k(full.shard(objective.temperature), getattr(objective, "top_k", 4) + 2)
    return TopK(logp_R=logp_R, ids_RK=ids_RK, top_logp_RK=top_logp_RK)


def _groups(tp: int) -> Groups:
    """Tensor-parallel ranks are neighbours, data-parallel ranks `tp` apart."""
    size = dist.get_world_size()
    tensor = [dist.new_group(list(range(first, first + tp))) for first in range(0, size, tp)]
    data = [dist.new_group(list(range(first, size, tp))) for first in range(tp)]
    return tensor[dist.get_rank() // tp], data[dist.get_rank() % tp]
