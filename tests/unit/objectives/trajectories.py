"""A step of trajectories with given logits, rewards, origins and log-probs of the engine, planned and differentiated.

Each token's pull, minus the derivative of the loss in its log-prob, is read off the gradient in its row of logits: a
loss of sampled tokens has no other gradient than pull times (q - onehot).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_distill.data.packing import pack
from megatron_distill.losses.reduce import reduce
from megatron_distill.losses.vocab import logprob_and_entropy
from megatron_distill.objectives.base import Objective, Scope
from megatron_distill.types import (
    Batch,
    Full,
    Metric,
    MicroBatch,
    Origin,
    Plan,
    Prompt,
    Rollout,
    Scored,
    Stop,
    TeacherSignal,
    TokenStats,
    VocabPartition,
    VocabShard,
)

LETTERS = {"s": Origin.STUDENT, "t": Origin.TEACHER, "c": Origin.CONSTRUCTED}

type Name = tuple[str, int]
"""Group and sample of a trajectory."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A response, and what the student and the reference have for its tokens."""

    name: Name
    reward: float | None
    tokens: Sequence[int]
    logits_RV: Tensor
    origin: str
    stop: Stop
    ratio: float | None
    """q / q_old of every token; None: the engine gave no log-probs."""
    reference_RV: Tensor
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Loss of the whole step and what it does to each trajectory."""

    loss: float
    sums: Mapping[str, float]
    metrics: Mapping[str, Metric]
    plan: Plan
    batch: Batch
    gradients: Mapping[Name, Tensor]
    """[R, V]: in the logits."""
    pulls: Mapping[Name, list[float]]
    """By token: minus the derivative of the loss in its log-prob, if the loss is one of sampled tokens."""

    def planned(self, key: str) -> dict[Name, list[float]]:
        """By trajectory, what is planned for its tokens."""
        found = {}
        for micro, values in zip(self.batch.micro, self.plan.weights[key], strict=True):
            for place, one in enumerate(micro.sequences):
                found[one.rollout.group, one.rollout.sample] = values[micro.segment_R == place].tolist()
        return found


def trajectory(
    group: str,
    sample: int,
    reward: float | None,
    tokens: int | Sequence[int],
    *,
    logits: Any = None,
    origin: str = "s",
    stop: Stop = Stop.EOS,
    ratio: float | None = 1.0,
    reference: Any = None,
    **facts: float,
) -> Trajectory:
    """By default tokens and logits of four ids are random, the same for the same name."""
    generator = torch.Generator().manual_seed(sum(map(ord, group)) * 100 + sample)
    ids = torch.randint(4, (tokens,), generator=generator).tolist() if isinstance(tokens, int) else tokens

    def given(values: Any) -> Tensor:
        drawn = torch.randn(len(ids), 4, generator=generator).double()
        return drawn if values is None else torch.tensor(values, dtype=torch.float64).expand(len(ids), -1)

    letters = origin + origin[-1] * len(ids)
    return Trajectory(
        name=(group, sample),
        reward=reward,
        tokens=ids,
        logits_RV=given(logits),
        origin=letters[: len(ids)],
        stop=stop,
        ratio=None if origin == "c" else ratio,
        reference_RV=given(reference),
        facts=facts,
    )


def group(name: str, rewards: Sequence[float], tokens: int | Sequence[int] = 2, **common: Any) -> list[Trajectory]:
    """Rollouts of one prompt, or repairs of them; all of one length, or one length for each."""
    lengths = [tokens] * len(rewards) if isinstance(tokens, int) else tokens
    return [
        trajectory(name, sample, reward, length, **common)
        for sample, (reward, length) in enumerate(zip(rewards, lengths, strict=True))
    ]


def scored(one: Trajectory, temperature: float = 1.0) -> Scored:
    logp_R = (one.logits_RV / temperature).log_softmax(-1)[range(len(one.tokens)), list(one.tokens)]
    old_R = None if one.ratio is None else logp_R - torch.tensor(one.ratio, dtype=torch.float64).log()
    rollout = Rollout(
        prompt=Prompt(id=one.name[0], messages=(), tokens=(1, 2)),
        group=one.name[0],
        sample=one.name[1],
        tokens=tuple(one.tokens),
        logprobs=None if old_R is None else tuple(old_R.tolist()),
        origin=tuple(LETTERS[letter] for letter in one.origin),
        stop=one.stop,
        version=0,
    )
    return Scored(rollout=rollout, reward=one.reward, facts=one.facts)


def packed(
    trajectories: Sequence[Trajectory],
    budget: int = 10**6,
    dp_rank: int = 0,
    dp_size: int = 1,
    temperature: float = 1.0,
) -> Batch:
    return pack(
        [scored(one, temperature) for one in trajectories],
        dp_rank=dp_rank,
        dp_size=dp_size,
        tokens_per_micro_batch=budget,
        device=torch.device("cpu"),
        version=0,
    )


def run(
    objective: Objective,
    trajectories: Sequence[Trajectory],
    teachers: Sequence[str] = ("reference",),
    scope: Scope | None = None,
    **cut: int,
) -> Outcome:
    """One step of this rank's share, in float64 but for what the batch holds in float32."""
    batch = packed(trajectories, temperature=objective.temperature, **cut)
    by_name = {one.name: one for one in trajectories}
    held = [[by_name[one.rollout.group, one.rollout.sample] for one in micro.sequences] for micro in batch.micro]
    logits = [
        torch.cat([torch.empty(0, 4, dtype=torch.float64), *(one.logits_RV for one in some)]).requires_grad_()
        for some in held
    ]
    partition = VocabPartition(start=0, width=4, valid=4, group=None)
    shards = [VocabShard.of(logits_RV, partition, objective.temperature) for logits_RV in logits]
    stats = _stats(objective, shards, batch.micro)
    plan, _ = objective.prepare(stats, batch, scope or Scope(seed=0, step=0), objective.initial())
    total, sums = torch.zeros((), dtype=torch.float64), dict[str, float]()
    for index, (shard, micro, some) in enumerate(zip(shards, batch.micro, held, strict=True)):
        whole = slice(0, micro.rows)
        signals: dict[str, TeacherSignal] = {}
        if objective.needs.teacher is not None:
            rows = torch.cat([torch.empty(0, 4, dtype=torch.float64), *(one.reference_RV for one in some)])
            full = Full(hidden_RH=rows, head_vH=torch.eye(4, dtype=torch.float64), partition=partition)
            signals = dict.fromkeys(teachers, full)
        terms = objective.loss(shard, signals, micro.responses(whole), plan.rows(index, whole))
        scalar, parts = reduce(terms, plan.denominators)
        total = total + scalar
        sums = {name: sums.get(name, 0.0) + float(part) for name, part in parts.items()}
    total.backward()
    gradients: dict[Name, Tensor] = {}
    pulls: dict[Name, list[float]] = {}
    for some, leaf in zip(held, logits, strict=True):
        assert leaf.grad is not None
        for one, part_RV in zip(some, leaf.grad.split([len(one.tokens) for one in some]), strict=True):
            gradients[one.name] = part_RV
            p_RV = (one.logits_RV / objective.temperature).softmax(-1)
            at = range(len(one.tokens)), list(one.tokens)
            pulls[one.name] = (-part_RV[at] / (1 - p_RV[at]) * objective.temperature).tolist()
    return Outcome(
        loss=float(total.detach()),
        sums=sums,
        metrics={metric.name: metric for metric in plan.metrics},
        plan=plan,
        batch=batch,
        gradients=gradients,
        pulls=pulls,
    )


def _stats(objective: Objective, shards: Sequence[VocabShard], micro: Sequence[MicroBatch]) -> TokenStats:
    needs = objective.needs
    if needs.student_logprobs == "none":
        return TokenStats()
    if needs.student_logprobs == "rollout":
        return TokenStats(student_logp=tuple(one.rollout_logp_R for one in micro))
    with torch.no_grad():
        both = [logprob_and_entropy(shard, one.target_R) for shard, one in zip(shards, micro, strict=True)]
    entropy = tuple(entropy_R for _, entropy_R in both) if needs.entropy else None
    return TokenStats(student_logp=tuple(logp_R for logp_R, _ in both), entropy=entropy)
