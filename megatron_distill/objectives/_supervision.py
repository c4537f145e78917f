"""What all objectives with a teacher share: how several teachers divide the work, and how much of them is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_distill.errors import ConfigError
from megatron_distill.losses.divergence import divergence
from megatron_distill.losses.kinds import Clip, Divergence, Outside
from megatron_distill.losses.signal import teacher_shard, teacher_top_k
from megatron_distill.objectives.base import Objective, PerMicro, Reduction, Scope, reduction_weights
from megatron_distill.types import Batch, Fidelity, Plan, TeacherSignal, Token, TokenStats, VocabShard


@dataclass(frozen=True, kw_only=True)
class Supervised(Objective):
    """An objective that compares the student's distribution with teachers'."""

    support: Literal["full", "top_k"] = "full"
    """Compare whole vocabularies, or only the teacher's `top_k` likeliest ids and what `outside` says of the rest."""
    top_k: int = 64
    """Ids compared with `support: top_k`."""
    outside: Outside = "tail"
    """With `support: top_k`, the ids that the teacher did not name. `tail`: together one more id. `renormalise`: both
    models as if there were none. `renormalise_teacher`: the teacher only. `truncate`: left out of the sum."""
    reduction: Reduction = "token_mean"
    """Average over all tokens of the step, over sequences of their mean per token, or over sequences of their sum."""
    teacher_weights: Mapping[str, float] = field(default_factory=dict)
    """By teacher's name; empty: several teachers count equally."""
    teacher_sources: Mapping[str, str] = field(default_factory=dict)
    """By data source: the one teacher that judges its prompts; empty: all teachers judge all prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: must be at least 1")
        for name, weight in self.teacher_weights.items():
            if not weight > 0:
                raise ValueError(
                    f"teacher_weights.{name}={weight}: must be above 0; leave a teacher out under `teachers`"
                )
        if self.teacher_weights and self.teacher_sources:
            raise ValueError("teacher_weights and teacher_sources: give one of them, not both")

    def refuse_support(self, because: str) -> None:
        """Raises ValueError if `support` is set where no distributions are compared."""
        if self.support != "full":
            raise ValueError(f"support={self.support}: {because} compares single log-probs; leave it full")

    @property
    def fidelity(self) -> Fidelity:
        """What `compare` asks of a teacher."""
        return Fidelity.FULL if self.support == "full" else Fidelity.TOP_K

    @property
    def named_teachers(self) -> frozenset[str]:
        """For `Needs.teacher_names`: those that the settings speak of."""
        return frozenset(self.teacher_weights) | frozenset(self.teacher_sources.values())

    def supervised_plan(self, term: str, batch: Batch, scope: Scope, mask: PerMicro | None = None) -> Plan:
        """The plan of one term: its mean by `reduction` over the tokens that `mask` counts, and what `blend` reads."""
        weights, denominator = reduction_weights(batch, scope, self.reduction, mask)
        return Plan(weights={term: weights, **self.teacher_plan(batch)}, denominators={term: denominator})

    def teacher_plan(self, batch: Batch) -> dict[str, PerMicro]:
        """By `share of <teacher>`: 1 for tokens that it judges and 0 for others; empty without `teacher_sources`.

        Raises:
            ConfigError: the batch holds a data source without a teacher.
        """
        if not self.teacher_sources:
            return {}
        return {
            f"share of {name}": tuple(
                torch.tensor(
                    [float(self._judge(one.rollout.prompt.source) == name) for one in micro.sequences] or [0.0],
                    device=micro.target_R.device,
                )[micro.segment_R]
                for micro in batch.micro
            )
            for name in sorted(set(self.teacher_sources.values()))
        }

    def _judge(self, source: str) -> str:
        if source not in self.teacher_sources:
            raise ConfigError(
                f"objective.teacher_sources: no teacher for data source {source!r}, only for "
                f"{', '.join(sorted(self.teacher_sources))}: add objective.teacher_sources.{source}=NAME"
            )
        return self.teacher_sources[source]

    def mean_teacher_logp(self, stats: TokenStats, batch: Batch) -> PerMicro:
        """Log-probs of the response tokens, each teacher's weighted by its share: [R] per micro-batch."""
        shares = self.teacher_plan(batch)
        found = []
        for index in range(len(batch.micro)):
            weights = {name: share[index] for name, share in shares.items()}
            signals = {name: Token(logp_R=logp[index]) for name, logp in stats.teacher_logp.items()}
            found.append(self.blend(signals, weights, lambda signal: signal.logp_R))
        return tuple(found)

    def blend(
        self,
        teachers: Mapping[str, TeacherSignal],
        weights: Mapping[str, Tensor],
        value: Callable[[Any], Tensor],
    ) -> Tensor:
        """`value` of each teacher's signal, weighted by its share: [R].

        A row's shares sum to 1. Where a teacher has none its value counts nothing, whatever it is.
        """
        if not self.teacher_sources:
            shares = teacher_shares(teachers, self.teacher_weights)
            return torch.stack([share * value(teachers[name]) for name, share in shares.items()]).sum(0)
        parts = []
        for name in sorted(set(self.teacher_sources.values())):
            share_R = weights[f"share of {name}"]
            parts.append(value(teachers[name]).masked_fill(share_R == 0, 0.0))
        return torch.stack(parts).sum(0)

    def compare(self, student: VocabShard, signal: TeacherSignal, kind: Divergence, clip: Clip | None = None) -> Tensor:
        """The divergence of one teacher and the student as `support` and `outside` say, at `temperature`: [R]."""
        if self.support == "full":
            return divergence(student, teacher_shard(signal, self.temperature), kind, clip=clip)
        teacher = teacher_top_k(signal, self.top_k, self.temperature)
        return divergence(student, teacher, kind, outside=self.outside, clip=clip)


def teacher_shares(teachers: Mapping[str, TeacherSignal], weights: Mapping[str, float]) -> dict[str, float]:
    """How much each teacher counts, summing to 1: in proportion to `weights`, or equally if there are none.

    Raises:
        ConfigError: `weights` names other teachers than there are.
    """
    if not weights:
        return dict.fromkeys(teachers, 1.0 / len(teachers))
    if weights.keys() != teachers.keys():
        raise ConfigError(
            f"objective.teacher_weights: names {sorted(weights)}, the teachers are {sorted(teachers)}: "
            "give every teacher a weight, or leave the setting out for equal weights"
        )
    return {name: weights[name] / sum(weights.values()) for name in teachers}
