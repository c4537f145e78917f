"""What an objective is: hyperparameters, what it needs from the rest, a plan before the backward pass, and terms.

Two passes. `prepare` sees detached statistics of whole sequences and may sum over data-parallel ranks; it fixes every
weight and denominator. `loss` is then linear in per-token terms, so rows may be cut into chunks, micro-batches and
ranks at will: every cut adds up to the same loss and gradient. Nothing here reduces to a scalar; `losses.reduce` does.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_distill.errors import ConfigError, DataError
from megatron_distill.types import (
    Batch,
    Fidelity,
    MicroBatch,
    Origin,
    Plan,
    Responses,
    TeacherSignal,
    Term,
    TokenStats,
    VocabShard,
)

type State = Mapping[str, float]
"""What an objective remembers between steps; it goes into checkpoints as it is."""

type Reduction = Literal["token_mean", "sequence_mean", "sequence_sum"]
"""`token_mean`: every token of the step counts alike. `sequence_mean`: every sequence does, by its mean per token.
`sequence_sum`: the mean over sequences of their sum over tokens, so that long ones count more."""

type PerMicro = tuple[Tensor, ...]
"""One tensor per micro-batch of this rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an objective asks of the other parts; checked when a config is loaded, before any device is touched."""

    teacher: Fidelity | None = None
    """The least that a teacher's signal must carry; None: no teacher."""
    teacher_names: frozenset[str] = frozenset()
    """Teachers that must be there by these names, such as a `reference`; none may be there besides. Empty: any."""
    reward: bool = False
    group: bool = False
    """Whether it compares several rollouts of one prompt."""
    pairs: bool = False
    """Whether every group is a pair: the chosen response with reward 1, the rejected one with reward 0."""
    student_logprobs: Literal["none", "rollout", "recompute"] = "none"
    """Which `TokenStats.student_logp` `prepare` reads: none, the engine's, or a forward pass of the trainer's."""
    entropy: bool = False
    """Whether `prepare` reads `TokenStats.entropy`; it comes with `student_logprobs: recompute`."""
    teacher_logprobs: bool = False
    """Whether `prepare` reads `TokenStats.teacher_logp`, of every teacher."""
    origins: frozenset[Origin] = frozenset(Origin)
    """Whose tokens it can learn from."""
    holds: frozenset[Origin] = frozenset()
    """Whose tokens it looks for: with rollouts that never hold them it would be another objective, or none."""
    unfiltered_samples: bool = False
    """Whether its mean over tokens stands for one over the student's own distribution, at the loss's temperature: then
    sampling may not leave any token out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """The step that `prepare` plans for: its number, its randomness, and sums over all of its data."""

    seed: int
    step: int
    data_group: ProcessGroup | None = None
    """Ranks that hold the other shares of the step; None where this rank holds it all."""

    def total(self, value: Tensor) -> Tensor:
        """Sum of `value` over data-parallel ranks; every one of them must call it."""
        summed = value.clone()
        if self.data_group is not None and self.data_group.size() > 1:
            dist.all_reduce(summed, group=self.data_group)
        return summed

    def gather(self, values: Tensor) -> Tensor:
        """Every data-parallel rank's `values`, of any length along the first axis, put end to end in rank order."""
        if self.data_group is None or self.data_group.size() == 1:
            return values
        lengths = torch.zeros(self.data_group.size(), dtype=torch.int64, device=values.device)
        lengths[self.data_group.rank()] = len(values)
        dist.all_reduce(lengths, group=self.data_group)
        longest = int(lengths.max())
        padded = values.new_zeros(longest, *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self.data_group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths.tolist(), strict=True)])

    def uniform(self, count: int, *key: int | str) -> Tensor:
        """`count` fp32 draws from [0, 1) that depend on seed, step and `key` alone: the same on every rank and rerun.

        The key is a name and a sequence's `index_S`, say; the i-th draw is then that of its i-th response token,
        however the step is cut (counter-based Philox).
        """
        digest = hashlib.blake2b(repr((self.seed, self.step, *key)).encode(), digest_size=16).digest()
        source = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))
        return torch.from_numpy(source.random(count, dtype=np.float32))


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Base of all objectives. Subclasses are frozen dataclasses: their fields are the keys of `objective:` in YAML."""

    temperature: float = 1.0
    """Divides the logits of student and teacher inside the loss. On-policy data wants the sampling temperature here."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: must be above 0")

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """A property, because it may follow from the fields."""

    def initial(self) -> State:
        """State before the first step."""
        return {}

    @abstractmethod
    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        """Fix weights and denominators of the step; no gradient. Runs alike on every model-parallel rank."""

    @abstractmethod
    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        """Terms of some rows. All arguments speak of the same rows; collectives only over tensor-parallel ranks.

        Args:
            student: logits that carry the gradient; `losses` reads them at `temperature`.
            teachers: signals by the teacher's name.
            weights: what `prepare` planned for these rows, by term name.
        """

    def check_origins(self, batch: Batch) -> None:
        """Refuse tokens that this objective would learn the wrong thing from.

        Raises:
            ConfigError: the batch holds tokens of an origin that is not in `needs.origins`.
        """
        allowed = self.needs.origins
        if allowed == frozenset(Origin):
            return
        for micro in batch.micro:
            strangers = {Origin(origin) for origin in micro.origin_R.unique().tolist()} - allowed
            if strangers:
                raise ConfigError(
                    f"objective: {type(self).__name__} with these settings learns from "
                    f"{_names(allowed)} tokens, the batch holds {_names(strangers)} tokens: change the rollout source, "
                    "or the objective's settings"
                )

    def check_logprobs(self, batch: Batch) -> None:
        """Refuse tokens of the student without the engine's log-probs: for objectives that read them.

        Raises:
            DataError: a token that the student sampled has no log-prob.
        """
        for micro in batch.micro:
            if bool((micro.rollout_logp_R.isnan() & (micro.origin_R == Origin.STUDENT)).any()):
                raise DataError(
                    "objective.old_logprobs=rollout: the step holds tokens of the student without the engine's "
                    "log-probs: take them from rollout.kind=generate, or have objective.old_logprobs from the trainer"
                )

    def refuse_idle(self, because: str, *names: str) -> None:
        """Raises ValueError if one of these fields, which nothing reads `because`, is not at its default."""
        for one in fields(self):
            default = one.default if one.default_factory is MISSING else one.default_factory()
            if one.name in names and (value := getattr(self, one.name)) != default:
                raise ValueError(f"{one.name}={value}: {because} does not read it; leave it {default}")


def sequence_sums(micro: MicroBatch, value_R: Tensor) -> Tensor:
    """Sum over each sequence's response tokens: [S], in at least fp32."""
    wide = value_R if value_R.is_floating_point() else value_R.float()
    # segment by segment and never by atomics: the same bits on every model-parallel rank of a GPU machine
    lengths_S = micro.segment_R.bincount(minlength=len(micro.sequences))
    return torch.segment_reduce(wide, "sum", lengths=lengths_S, unsafe=True)


def group_sums(batch: Batch, scope: Scope, values: PerMicro) -> Tensor:
    """Sum of `values`, [S] per micro-batch, over each group of the step: [groups], float64, equal on every rank.

    A group's sequences may lie on several data-parallel ranks.
    """
    sums = torch.zeros(batch.counts.groups, dtype=torch.float64, device=values[0].device)
    for micro, value_S in zip(batch.micro, values, strict=True):
        sums.index_add_(0, micro.group_S, value_S.double())
    return scope.total(sums)


def reduction_weights(
    batch: Batch, scope: Scope, reduction: Reduction, mask: PerMicro | None = None
) -> tuple[PerMicro, float]:
    """Weight per token and the denominator under which they are a mean over the whole step; collective with a mask.

    Args:
        mask: 1 (or true) for tokens that count, [R] per micro-batch; None: all do. `token_mean` divides by such
            tokens, `sequence_mean` by those of each sequence, then by sequences that have any, `sequence_sum` by
            sequences that have any.
    """
    if mask is None:
        counted: PerMicro = tuple(torch.ones(micro.rows, device=micro.target_R.device) for micro in batch.micro)
        tokens, sequences = float(batch.counts.tokens), float(batch.counts.sequences)
    else:
        counted = tuple(one.to(torch.get_default_dtype()) for one in mask)
        totals = [
            torch.stack([one_R.sum(), (sequence_sums(micro, one_R) > 0).sum()]).double()
            for micro, one_R in zip(batch.micro, counted, strict=True)
        ]
        tokens, sequences = scope.total(torch.stack(totals).sum(0)).tolist()
    if reduction == "token_mean":
        return counted, max(tokens, 1.0)
    if reduction == "sequence_mean":
        counted = tuple(
            one_R / sequence_sums(micro, one_R).clamp(min=1.0)[micro.segment_R]
            for micro, one_R in zip(batch.micro, counted, strict=True)
        )
    return counted, max(sequences, 1.0)


def pair_signs(batch: Batch, scope: Scope) -> PerMicro:
    """+1 for chosen and -1 for rejected sequences, [S] per micro-batch; collective.

    Raises:
        DataError: a group is not one response with reward 1 and one with reward 0.
    """
    rewards = tuple(micro.reward_S for micro in batch.micro)
    chosen = group_sums(batch, scope, tuple((one == 1).float() for one in rewards))
    rejected = group_sums(batch, scope, tuple((one == 0).float() for one in rewards))
    members = group_sums(batch, scope, tuple(torch.ones_like(one) for one in rewards))
    if bool(((chosen != 1) | (rejected != 1) | (members != 2)).any()):
        raise DataError(
            "the objective learns from pairs: every group must hold one chosen response with reward 1 and one rejected "
            "response with reward 0; use rollout.kind=pairs"
        )
    return tuple(2.0 * one - 1.0 for one in rewards)


def _names(origins: frozenset[Origin] | set[Origin]) -> str:
    return " and ".join(sorted(origin.name.lower() for origin in origins))
