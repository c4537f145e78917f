"""A step whose student and teachers are given by their logits, through real packing, planning and reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_distill.data.packing import pack
from megatron_distill.losses.reduce import reduce
from megatron_distill.losses.signal import teacher_logprob
from megatron_distill.losses.vocab import logprob_and_entropy
from megatron_distill.objectives.base import Objective, Scope
from megatron_distill.types import (
    Batch,
    Full,
    Metric,
    Origin,
    Plan,
    Prompt,
    Rollout,
    Scored,
    Stop,
    TokenStats,
    VocabPartition,
    VocabShard,
)

STUDENT = torch.tensor([1.0, 0.5, -0.5, -2.0], dtype=torch.float64)
TEACHER = torch.tensor([0.0, 2.0, -1.0, -3.0], dtype=torch.float64)
"""Logits of the specification's golden vector."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Loss, `loss/<term>` and gradient in the student's logits, of the whole step."""

    loss: float
    sums: Mapping[str, float]
    gradient_RV: Tensor
    plan: Plan
    metrics: Mapping[str, Metric]


def packed(
    tokens: Sequence[Sequence[int]],
    *,
    origins: Sequence[Sequence[Origin]] | None = None,
    logprobs: Sequence[Sequence[float]] | None = None,
    sources: Sequence[str] | None = None,
    budget: int = 1_000_000,
    dp_rank: int = 0,
    dp_size: int = 1,
    multiple: int = 1,
) -> Batch:
    """One prompt per response, in the order given."""
    scored = []
    for place, response in enumerate(tokens):
        rollout = Rollout(
            prompt=Prompt(id=str(place), messages=(), tokens=(1, 2), source=sources[place] if sources else ""),
            group=f"{place:06d}",
            sample=0,
            tokens=tuple(response),
            logprobs=tuple(logprobs[place]) if logprobs else None,
            origin=tuple(origins[place]) if origins else (Origin.STUDENT,) * len(response),
            stop=Stop.EOS,
            version=0,
        )
        scored.append(Scored(rollout=rollout, reward=None))
    return pack(
        scored,
        dp_rank=dp_rank,
        dp_size=dp_size,
        tokens_per_micro_batch=budget,
        sequence_multiple=multiple,
        device=torch.device("cpu"),
        version=0,
    )


def run(
    objective: Objective,
    batch: Batch,
    student_RV: Tensor,
    teachers_RV: Mapping[str, Tensor] | Tensor,
    *,
    step: int = 0,
    seed: int = 0,
) -> Outcome:
    """One step of a batch that is one micro-batch; its rows are those of the logits, response by response."""
    (micro,) = batch.micro
    named = {"teacher": teachers_RV} if isinstance(teachers_RV, Tensor) else teachers_RV
    leaf_RV = student_RV.detach().double().clone().requires_grad_()
    theirs = {name: logits_RV.detach().double().clone().requires_grad_() for name, logits_RV in named.items()}
    width = leaf_RV.shape[1]
    partition = VocabPartition(start=0, width=width, valid=width, group=None)
    head_VV = torch.eye(width, dtype=torch.float64)
    signals = {
        name: Full(hidden_RH=logits_RV, head_vH=head_VV, partition=partition) for name, logits_RV in theirs.items()
    }
    shard = VocabShard.of(leaf_RV, partition, objective.temperature)
    plan = _plan(objective, batch, leaf_RV, signals, step, seed)
    whole = slice(0, micro.rows)
    terms = objective.loss(shard, signals, micro.responses(whole), plan.rows(0, whole))
    scalar, sums = reduce(terms, plan.denominators)
    scalar.backward()
    assert leaf_RV.grad is not None
    assert all(one.grad is None for one in theirs.values()), "a teacher got a gradient"
    assert terms.keys() == plan.denominators.keys()
    return Outcome(
        loss=float(scalar.detach()),
        sums={name: float(one) for name, one in sums.items()},
        gradient_RV=leaf_RV.grad,
        plan=plan,
        metrics={metric.name: metric for metric in plan.metrics},
    )


@torch.no_grad()
def _plan(
    objective: Objective, batch: Batch, student_RV: Tensor, signals: Mapping[str, Full], step: int, seed: int
) -> Plan:
    (micro,) = batch.micro
    partition = next(iter(signals.values())).partition
    shard = VocabShard.of(student_RV, partition, objective.temperature)
    logp_R, entropy_R = logprob_and_entropy(shard, micro.target_R)
    stats = TokenStats(
        student_logp=(micro.rollout_logp_R if objective.needs.student_logprobs == "rollout" else logp_R,),
        entropy=(entropy_R,) if objective.needs.entropy else None,
        teacher_logp={
            name: (teacher_logprob(signal, micro.target_R, objective.temperature),) for name, signal in signals.items()
        }
        if objective.needs.teacher_logprobs
        else {},
    )
    plan, _ = objective.prepare(stats, batch, Scope(seed=seed, step=step), objective.initial())
    return plan


def every_token(objective: Objective, sampler_V: Tensor | None = None) -> Tensor:
    """Expected gradient in the student's logits over the one token of a response, by enumeration: [V].

    The token comes from `sampler_V` (probabilities), which is also what the engine wrote down; default: the student.
    """
    probabilities = (STUDENT / objective.temperature).softmax(-1) if sampler_V is None else sampler_V
    batch = packed([(token,) for token in range(4)], logprobs=[(float(one.log()),) for one in probabilities])
    found = run(objective, batch, STUDENT.expand(4, 4), TEACHER.expand(4, 4))
    return 4 * (probabilities[:, None] * found.gradient_RV).sum(0)
