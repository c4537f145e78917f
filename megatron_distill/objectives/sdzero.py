"""Self-Distillation Zero: learn to revise one's own answers, then to answer at once as one would after revising.

`phase: revision` (the paper's self-revision training, equations 1-3) learns from traces that the student wrote itself:
a first answer y_0, a control phrase P_r that says whether it was right, and a verified revision y_1. With

    L = L_generation + L_revision = -log q(y_0, P_r, y_1 | x) - log q(y_1 | x, y_0, P_r)

both parts score the same sequence, so that one pass does: each token's cross entropy counts once, the revision's twice.
The phrase is CONSTRUCTED, and the revision is what follows the last CONSTRUCTED token.

`phase: distillation` (equation 4): the student answers, a verifier judges, and the teacher, the weights at the end of
phase 1, reads x, y and P_r before it scores y once more (the teacher's view `revision`):

    L = mean over tokens of KL( q(. | x, y_<t) || sg p(. | x, y, P_r, y_<t) )          q student, p teacher

Defaults, the paper's equations and the released code differ; configs/objectives/sdzero*.yaml and docs have all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_distill.errors import DataError
from megatron_distill.losses.kinds import Divergence
from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives._supervision import Supervised
from megatron_distill.objectives._trajectories import after_constructed, before_constructed, constructed, ended
from megatron_distill.objectives.base import Needs, Scope, State, reduction_weights
from megatron_distill.types import Batch, Origin, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard


@dataclass(frozen=True, kw_only=True)
class SDZero(Supervised):
    """Cross entropy in which revisions count twice, then the divergence from a teacher that has seen the verdict."""

    phase: Literal["revision", "distillation"] = "distillation"
    """Which of the two trainings this run is; each has its own data."""
    divergence: Literal["reverse_kl", "forward_kl", "mixed_kl"] = "reverse_kl"
    """KL(student || teacher), KL(teacher || student), or both, `forward_weight` saying how much of the latter."""
    forward_weight: float = 0.5
    """With `divergence: mixed_kl`."""
    support: Literal["full", "top_k"] = "top_k"
    """Compare whole vocabularies, or only the teacher's `top_k` likeliest ids and what `outside` says of the rest."""
    mask_truncated: bool = True
    """Distillation: leave out responses that were cut off. Their verdict is about length, not about reasoning."""
    generation_weight: float = 1.0
    """Revision: weight of L_generation; 0 in the second run of the released code."""
    revision_weight: float = 1.0
    """Revision: weight of L_revision; 0 in the first run of the released code."""
    init_weight: float = 1.0
    """Revision: weight of the first answer's tokens in L_generation; below 1, wrong answers are imitated less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.forward_weight <= 1:
            raise ValueError(f"forward_weight={self.forward_weight}: must be from 0 to 1")
        for name in ("generation_weight", "revision_weight", "init_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if not self.generation_weight + self.revision_weight:
            raise ValueError("generation_weight=0, revision_weight=0: one of them must be above 0")
        if self.phase == "revision":
            comparing = ("support", "top_k", "outside", "teacher_weights", "teacher_sources")
            self.refuse_idle("phase=revision", "divergence", "forward_weight", "mask_truncated", *comparing)
        else:
            self.refuse_idle("phase=distillation", "generation_weight", "revision_weight", "init_weight")
        if self.divergence != "mixed_kl":
            self.refuse_idle(f"divergence={self.divergence}", "forward_weight")

    @property
    def needs(self) -> Needs:
        if self.phase == "revision":
            return Needs(holds=frozenset({Origin.STUDENT, Origin.CONSTRUCTED}))
        return Needs(
            teacher=self.fidelity,
            teacher_names=self.named_teachers,
            reward=True,
            origins=frozenset({Origin.STUDENT}),
        )

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        if self.phase == "revision":
            return self._revision_plan(batch, scope), state
        self.check_origins(batch)
        mask = tuple(ended(micro)[micro.segment_R] for micro in batch.micro) if self.mask_truncated else None
        return self.supervised_plan(self.divergence, batch, scope, mask), state

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        if self.phase == "revision":
            value_R = -logprob(student, rows.target_R)
            return {name: Term(value_R=value_R, weight_R=weights[name]) for name in ("generation", "revision")}
        kind = Divergence(self.divergence, self.forward_weight if self.divergence == "mixed_kl" else 0.0)
        value_R = self.blend(teachers, weights, lambda signal: self.compare(student, signal, kind))
        return {self.divergence: Term(value_R=value_R, weight_R=weights[self.divergence])}

    def _revision_plan(self, batch: Batch, scope: Scope) -> Plan:
        plain = torch.stack([(~constructed(micro)).sum() for micro in batch.micro]).sum()
        if number := int(scope.total(plain)):
            raise DataError(
                f"{number} of the step's {batch.counts.sequences} traces have no control phrase (CONSTRUCTED tokens) "
                "between answer and revision: objective.phase=revision learns from recorded revisions only"
            )
        everything, whole = reduction_weights(batch, scope, self.reduction)
        revised = tuple(after_constructed(micro) for micro in batch.micro)
        revision, part = reduction_weights(batch, scope, self.reduction, revised)
        generation = tuple(
            self.generation_weight * torch.where(before_constructed(micro), self.init_weight * one, one)
            for micro, one in zip(batch.micro, everything, strict=True)
        )
        return Plan(
            weights={"generation": generation, "revision": tuple(self.revision_weight * one for one in revision)},
            denominators={"generation": whole, "revision": part},
        )
