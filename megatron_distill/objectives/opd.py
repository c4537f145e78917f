"""On-policy distillation: the reverse KL of student from teacher, on what the student itself wrote.

Thinking Machines, "On-Policy Distillation" (2025): the advantage of a token is A = log p(y) - log q_old(y), p the
teacher and q_old the student that sampled, and the student q follows the policy gradient -(q/q_old) A grad log q(y).
With q_old = q that is, in expectation, the gradient of the reverse KL per token; back-propagating the estimator itself
would give zero. `divergence: reverse_kl` takes the exact expectation over the vocabulary, or over the teacher's top-k,
instead: no sampling noise, but more of the teacher's distribution. There is no reward and no discounting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_distill.losses.kinds import Divergence
from megatron_distill.losses.policy import k1
from megatron_distill.losses.signal import teacher_logprob
from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives._sampled import Weighted
from megatron_distill.objectives.base import Needs, Scope, State
from megatron_distill.types import Batch, Fidelity, Origin, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard


@dataclass(frozen=True, kw_only=True)
class OPD(Weighted):
    """KL(student || teacher) per token, by the sampled token's policy gradient or over the vocabulary."""

    divergence: Literal["sampled_token", "reverse_kl"] = "sampled_token"
    """`sampled_token` needs one log-prob per token from the teacher and tokens that the student sampled;
    `reverse_kl` needs the teacher's distribution, as much of it as `support` says, and takes any tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence == "reverse_kl" and self.old_logprobs == "rollout":
            raise ValueError("old_logprobs=rollout: divergence=reverse_kl samples nothing; leave it current")
        if self.divergence == "sampled_token":
            self.refuse_support("divergence=sampled_token")

    @property
    def needs(self) -> Needs:
        if self.divergence == "reverse_kl":
            return Needs(teacher=self.fidelity, teacher_names=self.named_teachers)
        return Needs(
            teacher=Fidelity.TOKEN,
            student_logprobs="rollout" if self.old_logprobs == "rollout" else "none",
            origins=frozenset({Origin.STUDENT}),
            unfiltered_samples=True,
            teacher_names=self.named_teachers,
        )

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        self.check_samples(batch)
        return self.supervised_plan("reverse_kl", batch, scope), state

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        if self.divergence == "reverse_kl":
            kind = Divergence("reverse_kl")
            value_R = self.blend(teachers, weights, lambda signal: self.compare(student, signal, kind))
        else:
            logp_R = logprob(student, rows.target_R)
            old_logp_R = self.old_logp(logp_R, rows)
            teacher_logp_R = self.blend(
                teachers, weights, lambda signal: teacher_logprob(signal, rows.target_R, self.temperature)
            )
            # The value is the k1 estimate of the divergence; the gradient is that of -A log q(y).
            value_R = self.pull(logp_R, -k1(old_logp_R, teacher_logp_R), rows)
        return {"reverse_kl": Term(value_R=value_R, weight_R=weights["reverse_kl"])}
