"""What an objective is: hyperparameters, what it needs from the rest, a plan before the backward pass, and terms.

Two passes. `prepare` sees detached statistics of whole sequences and may sum over data-parallel ranks; it fixes every
weight and denominator. `loss` is then linear in per-token terms, so rows may be cut into chunks, micro-batches and
ranks at will: every cut adds up to the same loss and gradient. Nothing here reduces to a scalar; `losses.reduce` does.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_distill.errors import ConfigError
from megatron_distill.types import (
    Batch,
    Fidelity,
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

type Reduction = Literal["token_mean", "sequence_mean"]
"""`token_mean`: every token of the step counts alike. `sequence_mean`: every sequence does, by its mean per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an objective asks of the other parts; checked when a config is loaded, before any device is touched."""

    teacher: Fidelity | None = None
    """The least that a teacher's signal must carry; None: no teacher."""
    reward: bool = False
    group: bool = False
    """Whether it compares several rollouts of one prompt."""
    student_logprobs: Literal["none", "rollout", "recompute"] = "none"
    """Which `TokenStats.student_logp` `prepare` reads: none, the engine's, or a forward pass of the trainer's."""
    origins: frozenset[Origin] = frozenset(Origin)
    """Whose tokens it can learn from."""
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

    def rng(self, *key: int | str) -> torch.Generator:
        """A fresh CPU generator for `key`, a name and a sequence's `index_S` say: the same on every rank and rerun."""
        text = repr((self.seed, self.step, *key)).encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


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
            student: logits that carry the gradient, already divided by `temperature`.
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


def mean_plan(term: str, batch: Batch, reduction: Reduction) -> Plan:
    """The plan of an objective with one term, averaged over the whole step."""
    if reduction == "token_mean":
        weights = tuple(torch.ones(micro.rows, device=micro.target_R.device) for micro in batch.micro)
        count = batch.counts.tokens
    else:
        weights = tuple(1.0 / micro.lengths_S()[micro.segment_R] for micro in batch.micro)
        count = batch.counts.sequences
    return Plan(weights={term: weights}, denominators={term: float(max(count, 1))})


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


def check_teacher_weights(weights: Mapping[str, float]) -> None:
    """Raises ValueError unless all are above 0."""
    for name, weight in weights.items():
        if not weight > 0:
            raise ValueError(f"teacher_weights.{name}={weight}: must be above 0; leave a teacher out under `teachers`")


def _names(origins: frozenset[Origin] | set[Origin]) -> str:
    return " and ".join(sorted(origin.name.lower() for origin in origins))
