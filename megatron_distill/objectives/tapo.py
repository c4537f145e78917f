"""Trajectory-augmented policy optimisation: GRPO, and beside it the student's own repairs of its wrong answers.

For a query with right and wrong rollouts, the rollout source lets the student rebuild wrong ones: the error, a sentence
that notices it, the correction. These constructed trajectories (all tokens CONSTRUCTED, group `<uid>/ref`) are learned
as answers to the plain prompt, so that every log-prob here is the trainer's, never that of the synthesis prompt.

    L   = L_GRPO(originals) + weight L_ref(constructed)
    A   : within the originals, and within the constructed of the same query; never pooled
    w_t = clamp(exp(log q(y_t) + H(q)), 0.01, 10)       times each constructed token's surrogate; a constant

Tokens much less likely than the entropy lets expect are held back by w. It has mean exp(H - H_2) >= 1 over q. An
all-right (or all-wrong) group of constructed trajectories has no gradient; do not filter them by correctness.
There is no public code; the choices that the paper leaves open are told in docs/objectives/tapo.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives._advantages import GroupPolicy, by_token
from megatron_distill.objectives._trajectories import beyond_prefix, constructed, describe_constructed
from megatron_distill.objectives.base import Needs, PerMicro, Scope, State
from megatron_distill.types import Batch, Metric, Origin, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard


@dataclass(frozen=True, kw_only=True)
class TAPO(GroupPolicy):
    """GRPO on rollouts, and a token-weighted one on constructed trajectories with advantages of their own."""

    reduction: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """See `GroupPolicy.reduction`; of either term."""
    old_logprobs: Literal["rollout", "recompute"] = "recompute"
    """The old policy of rollouts; that of constructed trajectories is always recomputed, under the plain prompt."""
    constructed_weight: float = 1.0
    """Weight of the constructed trajectories' term (lambda)."""
    normalise: Literal["own", "joint"] = "own"
    """Divide either term by its own tokens (or sequences), or both by those of the whole step."""
    reference_scope: Literal["query", "batch"] = "query"
    """Compare constructed trajectories with those of the same query, or with all of the step."""
    lone_reference: Literal["zero", "reward"] = "zero"
    """Advantage of a constructed trajectory that has nothing to be compared with: 0, or its reward."""
    lowest_weight: float = 0.01
    highest_weight: float = 10.0
    """Bounds of w; both 1 switch the token weights off."""
    mask_prefix: bool = False
    """Leave out the copied beginning of a constructed trajectory, of as many tokens as the rollout source's fact
    `prefix_tokens` says. The paper trains on it: what is good about a repair then also reinforces its error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.constructed_weight < 0:
            raise ValueError(f"constructed_weight={self.constructed_weight}: must be 0 or more")
        if not 0 < self.lowest_weight <= self.highest_weight:
            raise ValueError(
                f"lowest_weight={self.lowest_weight}: must be above 0, up to highest_weight={self.highest_weight}"
            )

    @property
    def needs(self) -> Needs:
        teacher, names = self.reference
        return Needs(
            teacher=teacher,
            teacher_names=names,
            reward=True,
            group=True,
            student_logprobs="recompute",
            entropy=True,
            origins=frozenset({Origin.STUDENT, Origin.CONSTRUCTED}),
            holds=frozenset({Origin.CONSTRUCTED}),
            unfiltered_samples=True,
        )

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        self.check_origins(batch)
        if self.old_logprobs == "rollout":
            self.check_logprobs(batch)
        assert stats.student_logp is not None
        assert stats.entropy is not None
        kinds = tuple(constructed(micro) for micro in batch.micro)
        scored = self.scored(batch, scope)
        built = tuple(kind & judged for kind, judged in zip(kinds, scored, strict=True))
        written = tuple(~kind & judged for kind, judged in zip(kinds, scored, strict=True))
        originals = self.compare(batch, scope, written)
        repairs = self.compare(
            batch, scope, built, pooled=self.reference_scope == "batch", lone_reward=self.lone_reference == "reward"
        )
        learned = self.counted(batch, built, repairs)
        if self.mask_prefix:
            learned = tuple(mask_R & beyond_prefix(micro) for micro, mask_R in zip(batch.micro, learned, strict=True))
        (original, by_originals), (repair, by_repairs) = self._averages(
            batch, scope, self.counted(batch, written, originals), learned
        )
        suppression = tuple(
            (logp_R + entropy_R).exp().clamp(self.lowest_weight, self.highest_weight)
            for logp_R, entropy_R in zip(stats.student_logp, stats.entropy, strict=True)
        )
        old = stats.student_logp
        if self.old_logprobs == "rollout":
            old = tuple(
                torch.where(mask_R, logp_R, micro.rollout_logp_R)
                for micro, mask_R, logp_R in zip(batch.micro, by_token(batch, kinds), old, strict=True)
            )
        advantage = tuple(one + other for one, other in zip(originals.advantage, repairs.advantage, strict=True))
        terms = {
            "original": original,
            "constructed": tuple(self.constructed_weight * one for one in _times(repair, suppression)),
        }
        denominators = {"original": by_originals, "constructed": by_repairs}
        if self.kl_weight:
            terms["kl"], denominators["kl"] = tuple(self.kl_weight * one for one in original), by_originals
        plan = Plan(
            weights={**terms, "advantage": by_token(batch, advantage), "old_logp": old},
            denominators=denominators,
            metrics=(
                Metric("advantage/uniform_groups", *originals.uniform),
                Metric("tapo/uniform_references", *repairs.uniform),
                *describe_constructed(batch, scope, suppression),
            ),
        )
        return plan, state

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        logp_R = logprob(student, rows.target_R)
        value_R = self.surrogate(logp_R, weights)
        terms = {name: Term(value_R=value_R, weight_R=weights[name]) for name in ("original", "constructed")}
        if self.kl_weight:
            terms["kl"] = Term(value_R=self.kl(logp_R, teachers, rows), weight_R=weights["kl"])
        return terms

    def _averages(
        self, batch: Batch, scope: Scope, originals: PerMicro, repairs: PerMicro
    ) -> tuple[tuple[PerMicro, float], tuple[PerMicro, float]]:
        """Weights and denominator of either term, from the tokens that count in it."""
        if self.normalise == "own":
            return self.average(batch, scope, originals), self.average(batch, scope, repairs)
        either = tuple(one | other for one, other in zip(originals, repairs, strict=True))
        weights, denominator = self.average(batch, scope, either)
        return (_times(weights, originals), denominator), (_times(weights, repairs), denominator)


def _times(values: PerMicro, by: PerMicro) -> PerMicro:
    return tuple(value * factor for value, factor in zip(values, by, strict=True))
