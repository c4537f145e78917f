"""Between an objective, which knows token arithmetic only, and the student's schedule, which knows logits only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_distill.losses.reduce import reduce
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


def token_stats(student: Student, batch: Batch, needs: Needs, temperature: float) -> TokenStats:
    """The detached per-token numbers that an objective asked for, before the backward pass.

    The student's log-probs are the engine's, or computed again by the trainer with `student_logprobs: recompute`.
    """
    if needs.student_logprobs == "none":
        return TokenStats()
    if needs.student_logprobs == "rollout":
        return TokenStats(student_logp=tuple(micro.rollout_logp_R for micro in batch.micro))
    return TokenStats(student_logp=student.score(batch, temperature))


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
        student = VocabShard.of(logits_Cv, self.partition, self.objective.temperature)
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
