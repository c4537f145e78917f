"""Between an objective, which knows token arithmetic only, and the student's schedule, which knows logits only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_distill.losses.reduce import reduce
from megatron_distill.losses.signal import teacher_logprob
from megatron_distill.models.student import Student
from megatron_distill.objectives.base import Needs, Objective
from megatron_distill.types import (
    Batch,
    MicroBatch,
    Plan,
    TeacherSignal,
    TokenStats,
    VocabPartition,
    VocabShard,
)

type Signals = Mapping[str, tuple[TeacherSignal, ...]]
"""By teacher name: one signal per micro-batch; empty on stages that see no logits."""


def token_stats(student: Student, batch: Batch, signals: Signals, needs: Needs, temperature: float) -> TokenStats:
    """The detached per-token numbers that an objective asked for, before the backward pass, equal on all its ranks."""
    student_logp = entropy = None
    if needs.entropy:
        student_logp, entropy = student.score_with_entropy(batch, temperature)
    elif needs.student_logprobs == "recompute":
        student_logp = student.score(batch, temperature)
    if needs.student_logprobs == "rollout":
        student_logp = tuple(micro.rollout_logp_R for micro in batch.micro)
    teacher_logp = {}
    if needs.teacher_logprobs:
        teacher_logp = {name: teacher_scores(student, batch, each, temperature) for name, each in signals.items()}
    return TokenStats(student_logp=student_logp, entropy=entropy, teacher_logp=teacher_logp)


@torch.no_grad()
def teacher_scores(
    student: Student, batch: Batch, signals: tuple[TeacherSignal, ...], temperature: float
) -> tuple[Tensor, ...]:
    """A teacher's log-probs of the response tokens: one [R] per micro-batch, on every model-parallel rank.

    Context-parallel ranks share the rows.
    """
    network, found = student.network, []
    for index, micro in enumerate(batch.micro):
        logp_R = torch.zeros(micro.rows, device=micro.target_R.device)
        if signals:
            mine = network.my_rows(micro.rows)
            starts = range(mine.start, max(mine.stop, mine.start + 1), student.chunk_rows)
            chunks = [slice(start, min(start + student.chunk_rows, mine.stop)) for start in starts]
            scores = [teacher_logprob(signals[index].rows(one), micro.target_R[one], temperature) for one in chunks]
            logp_R = network.all_rows(torch.cat(scores).float(), micro.rows)
        found.append(student.mesh.from_last_stage(logp_R))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundLoss:
    """An objective's loss with a step's signals and plan: raw logits of some rows in, their part of the loss out."""

    objective: Objective
    signals: Signals
    plan: Plan
    micro: tuple[MicroBatch, ...]
    partition: VocabPartition
    names: tuple[str, ...]

    def __call__(self, logits_Cv: Tensor, micro: int, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """See `models.schedule.MicroLoss`."""
        student = VocabShard.of(logits_Cv, self.partition, self.objective.temperature, disposable=True)
        teachers = {name: signals[micro].rows(rows) for name, signals in self.signals.items()}
        weights = self.plan.rows(micro, rows)
        terms = self.objective.loss(student, teachers, self.micro[micro].responses(rows), weights)
        return reduce(terms, self.plan.denominators)


def bind(objective: Objective, signals: Signals, plan: Plan, batch: Batch, partition: VocabPartition) -> BoundLoss:
    """Everything of a step but the logits."""
    return BoundLoss(
        objective=objective,
        signals=signals,
        plan=plan,
        micro=batch.micro,
        partition=partition,
        names=tuple(f"loss/{term}" for term in plan.denominators),
    )
