"""What objectives share whose whole loss is one divergence of student and teacher at every token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_distill.losses.kinds import Clip, Divergence
from megatron_distill.losses.sampled import check_sampled, sampled_divergence
from megatron_distill.losses.signal import teacher_logprob
from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives._supervision import Supervised
from megatron_distill.objectives.base import Needs, Scope, State
from megatron_distill.types import Batch, Fidelity, Origin, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard


@dataclass(frozen=True, kw_only=True)
class Compared(Supervised):
    """One term, `divergence`: what `measure` says, over what `support` says, or by the sampled token alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by_sampled_token:
            check_sampled(self.measure)
            self.refuse_support("the sampled token")

    @property
    @abstractmethod
    def measure(self) -> Divergence:
        """The divergence."""

    @property
    @abstractmethod
    def by_sampled_token(self) -> bool:
        """Whether one log-prob per token is all that is asked of a teacher (see `losses.sampled`)."""

    @property
    def clip(self) -> Clip | None:
        """Bounds of the divergence's entries; the sampled token has none."""
        return None

    @property
    def needs(self) -> Needs:
        if not self.by_sampled_token:
            return Needs(teacher=self.fidelity, teacher_names=self.named_teachers)
        return Needs(
            teacher=Fidelity.TOKEN,
            teacher_names=self.named_teachers,
            origins=frozenset({Origin.STUDENT}),
            unfiltered_samples=True,
        )

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        self.check_origins(batch)
        return self.supervised_plan("divergence", batch, scope), state

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        if self.by_sampled_token:
            logp_R = logprob(student, rows.target_R)

            def value(signal: TeacherSignal) -> Tensor:
                return sampled_divergence(
                    logp_R, teacher_logprob(signal, rows.target_R, self.temperature), self.measure
                )
        else:

            def value(signal: TeacherSignal) -> Tensor:
                return self.compare(student, signal, self.measure, self.clip)

        return {"divergence": Term(value_R=self.blend(teachers, weights, value), weight_R=weights["divergence"])}


@dataclass(frozen=True, kw_only=True)
class AnyDivergence(Compared):
    """The divergence is a setting, and so is how much any one id may add to it."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "sampled_token"] = "forward_kl"
    """`forward_kl` is KL(teacher || student). `sampled_token` is the reverse KL by one log-prob per token: it needs
    tokens that the student sampled, and has neither `support` nor clip."""
    beta: float = 0.5
    """With `divergence: jsd`, the weight of the teacher."""
    clip_low: float | None = None
    """Least that an id adds to the divergence, in nats; null: no bound."""
    clip_high: float | None = None
    """Most that an id adds to the divergence, in nats; null: no bound. An id beyond it has no gradient of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta={self.beta}: must be between 0 (forward KL) and 1 (reverse KL)")
        if self.clip_low is not None and self.clip_high is not None and not self.clip_low < self.clip_high:
            raise ValueError(f"clip_low={self.clip_low}: must be below clip_high={self.clip_high}, or null")
        if self.divergence != "jsd":
            self.refuse_idle(f"divergence={self.divergence}", "beta")
        if self.by_sampled_token:
            bounds = (name for name in ("clip_low", "clip_high") if getattr(self, name) is not None)
            self.refuse_idle("divergence=sampled_token", *bounds)

    @property
    def measure(self) -> Divergence:
        if self.divergence == "jsd":
            return Divergence("jsd", self.beta)
        return Divergence("reverse_kl" if self.divergence == "sampled_token" else self.divergence)

    @property
    def by_sampled_token(self) -> bool:
        return self.divergence == "sampled_token"

    @property
    def clip(self) -> Clip | None:
        return Clip(self.clip_low, self.clip_high)
