"""Group relative policy optimisation: each rollout is as good as it is better than others of the same prompt.

    A_i = (r_i - mean r) / (std r + 1e-6)           over the rollouts of one prompt, std over n - 1
    L   = mean of max(-A rho, -A clip(rho, 1 - low, 1 + high)) + kl_weight k3,   rho = q(y) / q_old(y)

GRPO (DeepSeekMath, arXiv 2402.03300), DAPO (arXiv 2503.14476: `clip_high`, `reduction: token_mean`,
`drop_uniform_groups`, `overlong_buffer`, `mask_truncated`) and Dr.GRPO (arXiv 2503.20783: `divide_by_std: false`,
`reduction: constant`) differ in settings only; configs/objectives/grpo*.yaml has them. One update is made per step,
so the ratio corrects for how the engine differs from the trainer and for stale rollouts; with
`old_logprobs: recompute` it is 1 and nothing is ever clipped. Refilling dropped groups is the rollout source's affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives._advantages import GroupPolicy, by_token
from megatron_distill.objectives.base import Needs, Scope, State
from megatron_distill.types import Batch, Metric, Origin, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard


@dataclass(frozen=True, kw_only=True)
class GRPO(GroupPolicy):
    """A clipped policy gradient of advantages within groups, with an optional KL to a reference model."""

    @property
    def needs(self) -> Needs:
        teacher, names = self.reference
        return Needs(
            teacher=teacher,
            teacher_names=names,
            reward=True,
            group=True,
            student_logprobs=self.old_logprobs,
            origins=frozenset({Origin.STUDENT}),
            unfiltered_samples=True,
        )

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        self.check_origins(batch)
        if self.old_logprobs == "rollout":
            self.check_logprobs(batch)
        assert stats.student_logp is not None
        scored = self.scored(batch, scope)
        compared = self.compare(batch, scope, scored)
        weights, denominator = self.average(batch, scope, self.counted(batch, scored, compared))
        terms = {"policy": weights}
        if self.kl_weight:
            terms["kl"] = tuple(self.kl_weight * one for one in weights)
        plan = Plan(
            weights={
                **terms,
                "advantage": by_token(batch, compared.advantage),
                "old_logp": stats.student_logp,
            },
            denominators=dict.fromkeys(terms, denominator),
            metrics=(
                Metric("advantage/uniform_groups", *compared.uniform),
                Metric("advantage/reward_std", float(compared.std_G.sum()), float(compared.std_G.numel())),
                Metric("advantage/denominator", denominator),
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
        terms = {"policy": Term(value_R=self.surrogate(logp_R, weights), weight_R=weights["policy"])}
        if self.kl_weight:
            terms["kl"] = Term(value_R=self.kl(logp_R, teachers, rows), weight_R=weights["kl"])
        return terms
