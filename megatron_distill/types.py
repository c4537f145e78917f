"""The nouns that flow through a step, in the order in which they appear.

    Prompt -> Rollout -> Scored -> Batch -> TeacherSignal -> TokenStats -> Plan -> Term -> StepReport

All are frozen; a stage returns a new noun and never changes an earlier one. Shape letters, one legend for the
project, carried in names (`logp_R`, `logits_Rv`):

    R  response tokens of a micro-batch        T  packed tokens          S  sequences
    V  vocabulary      v  its local shard      K  top-k                  H  hidden size

Everything after packing speaks `R`. The three classic bugs have one home each: the *shift* (row t scores token
t+1) is folded into `MicroBatch.response_R` by `data.packing`; *padded vocabulary* columns and the *temperature*
are declared by `VocabShard` and applied in `losses.regions` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class Origin(IntEnum):
    """Who wrote a response token."""

    STUDENT = 0
    TEACHER = 1
    CONSTRUCTED = 2
    """Neither sampled it: a demonstration from the data, or text that a workflow put together."""


class Stop(StrEnum):
    """Why a response ended."""

    EOS = "eos"
    LENGTH = "length"
    ABORTED = "aborted"


class Fidelity(IntEnum):
    """How much of a teacher's distribution a signal carries; a richer one answers every poorer question."""

    TOKEN = 0
    TOP_K = 1
    FULL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question as the student reads it."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    """Chat messages, each with `role` and `content`, without the answer."""
    tokens: tuple[int, ...]
    """`messages` through the chat template, generation prompt included."""
    answer: str | None = None
    """The gold answer that a verifier compares with."""
    hints: Mapping[str, str] = field(default_factory=dict)
    """Privileged context by name, e.g. `solution`; only teachers' views read it."""
    source: str = ""
    """Name of the data source, for several teachers by source."""


def versions_of(version: int, versions: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """One version per token; none given means that `version` wrote them all."""
    if not versions:
        return (version,) * tokens
    assert len(versions) == tokens, f"{len(versions)} versions for {tokens} tokens"
    assert min(versions) == version, f"version={version}: must be the oldest of {sorted(set(versions))}"
    return versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One response to one prompt; token ids are those the engine sampled, never re-tokenised text."""

    prompt: Prompt
    group: str
    """Rollouts of one prompt in one step share it."""
    sample: int
    """Index within the group."""
    tokens: tuple[int, ...]
    """Response ids; the end-of-sequence id included when `stop` is EOS."""
    logprobs: tuple[float, ...] | None
    """Natural log-probabilities under the engine's sampling temperature, one per token; None for demonstrations."""
    temperature: float | None = None
    """Of `logprobs`; None where there are none, or nobody wrote it down."""
    origin: tuple[Origin, ...]
    stop: Stop
    version: int
    """Optimizer steps behind the oldest weights that wrote any of it."""
    versions: tuple[int, ...] = ()
    """The same for each token, where the weights changed while it was written; left out, `version` wrote it all.
    Tokens that the student did not sample have `version`."""
    text: str = ""
    """What the verifier reads, and people: the response without special tokens, or the part of it that is judged."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", versions_of(self.version, self.versions, len(self.tokens)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A rollout with its verifier's verdict."""

    rollout: Rollout
    reward: float | None
    facts: Mapping[str, float] = field(default_factory=dict)
    """Whatever else was measured on it, by metric name."""

    @property
    def right(self) -> bool:
        """Whether the verifier called it right: a reward above 1/2. What it could not score is not right."""
        return self.reward is not None and self.reward > 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Sizes of a whole step, equal on every rank: the denominators of losses."""

    tokens: int
    sequences: int
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """Some rows of a micro-batch's response axis: what a loss may know about the tokens it judges."""

    target_R: Tensor
    segment_R: Tensor
    origin_R: Tensor
    rollout_logp_R: Tensor
    version_R: Tensor

    @property
    def sampled_R(self) -> Tensor:
        """bool: tokens that the student sampled and whose log-probs the engine wrote down."""
        return (self.origin_R == Origin.STUDENT) & ~self.rollout_logp_R.isnan()


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Sequences packed end to end: what one forward pass reads, and the response axis R laid over it.

    Each sequence enters as prompt + response without its last token, whose logits nobody asks for.
    """

    input_T: Tensor
    """int64 token ids."""
    position_T: Tensor
    """int64, restarting at 0 in every sequence."""
    cu_seqlens: Tensor
    """int32 [S+1]: where each sequence starts in T; the last entry is T."""
    response_R: Tensor
    """int64: the row of T whose logits score `target_R`."""
    target_R: Tensor
    """int64 ids of the response tokens."""
    segment_R: Tensor
    """int64: which sequence (index into S) a response token belongs to."""
    origin_R: Tensor
    """int8 `Origin`."""
    rollout_logp_R: Tensor
    """float32, the engine's log-probs; NaN where there is none."""
    version_R: Tensor
    """int64: optimizer steps behind the weights that sampled the token; of no meaning where nobody did."""
    reward_S: Tensor
    """float32; NaN where nothing was scored."""
    group_S: Tensor
    """int64: equal for rollouts of one prompt, unique within the step."""
    index_S: Tensor
    """int64: position of the sequence in the step, the same under every cut; keys randomness."""
    sequences: tuple[Scored, ...]
    """Where each sequence came from; teachers' views read it."""

    @property
    def rows(self) -> int:
        """R."""
        return self.target_R.numel()

    def responses(self, rows: slice) -> Responses:
        """Some rows of R; shares storage."""
        return Responses(
            target_R=self.target_R[rows],
            segment_R=self.segment_R[rows],
            origin_R=self.origin_R[rows],
            rollout_logp_R=self.rollout_logp_R[rows],
            version_R=self.version_R[rows],
        )

    def lengths_S(self) -> Tensor:
        """float32 [S]: response tokens of each sequence."""
        ones = torch.ones(self.rows, device=self.segment_R.device)
        return torch.zeros(len(self.sequences), device=ones.device).index_add_(0, self.segment_R, ones)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """This data-parallel rank's share of a step; `counts` speaks of the whole step."""

    micro: tuple[MicroBatch, ...]
    counts: Counts
    version: int
    """Oldest weights that wrote any of its rollouts."""
    temperature: float | None = None
    """Of all log-probs that the engine wrote down in the step; None: there are none, or not of one temperature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabPartition:
    """Which vocabulary columns this tensor-parallel rank holds, and which of them are real.

    Columns are global ids `start .. start+width`; ids from `valid` on are padding and never get probability.
    """

    start: int
    width: int
    valid: int
    group: ProcessGroup | None
    """Tensor-parallel group that together holds all columns; None when this rank holds them all."""

    @property
    def valid_width(self) -> int:
        """Real columns on this rank: the first `valid_width` of them."""
        return min(max(self.valid - self.start, 0), self.width)


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Raw logits [R, v] of this rank's vocabulary columns, and how to read them.

    Nothing is computed here. `losses` reads the real columns only, wide and divided by the temperature, where it
    needs them; the gradient that it gives is that of the raw logits, in their type, and 0 in padding columns.
    """

    logits_Rv: Tensor
    """Of any floating type; padding columns may hold anything."""
    partition: VocabPartition
    temperature: float = 1.0
    disposable: bool = False
    """Whether a backward pass may overwrite the logits with their gradient, because nobody else needs them."""
    readers: WeakSet[Any] = field(default_factory=WeakSet, repr=False, compare=False)
    """Loss functions whose backward pass has yet to read the logits: only the last of them may overwrite."""

    @staticmethod
    def of(
        logits_Rv: Tensor, partition: VocabPartition, temperature: float = 1.0, *, disposable: bool = False
    ) -> VocabShard:
        """Wrap raw logits; fp64 is computed in fp64, anything else in fp32.

        Raises:
            ValueError: the columns do not match the partition, or `temperature` is not positive.
        """
        if logits_Rv.shape[-1] != partition.width:
            raise ValueError(f"logits have {logits_Rv.shape[-1]} columns, the partition holds {partition.width}")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        return VocabShard(logits_Rv, partition, temperature, disposable)

    def scaled_Rv(self) -> Tensor:
        """A wide copy divided by the temperature, padding at -inf, through which gradients flow: [R, v].

        For figures and tests: a loss that starts from it holds several [R, v] at once.
        """
        wide = self.logits_Rv if self.logits_Rv.dtype == torch.float64 else self.logits_Rv.float()
        real = wide[:, : self.partition.valid_width] / self.temperature
        padding = self.partition.width - self.partition.valid_width
        return torch.nn.functional.pad(real, (0, padding), value=float("-inf")) if padding else real


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A teacher that gave only the log-prob of each response token."""

    logp_R: Tensor
    fidelity: Literal[Fidelity.TOKEN] = Fidelity.TOKEN

    def rows(self, rows: slice) -> Token:
        """The same signal on some rows."""
        return Token(logp_R=self.logp_R[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """A teacher that gave its k likeliest ids, replicated on every rank, besides the response token's log-prob."""

    logp_R: Tensor
    ids_RK: Tensor
    top_logp_RK: Tensor
    fidelity: Literal[Fidelity.TOP_K] = Fidelity.TOP_K

    def rows(self, rows: slice) -> TopK:
        """The same signal on some rows."""
        return TopK(logp_R=self.logp_R[rows], ids_RK=self.ids_RK[rows], top_logp_RK=self.top_logp_RK[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """A teacher's whole distribution as hidden states and its output weight on the *student's* partition.

    Hidden states are some thirty times smaller than logits; `shard` makes logits for as many rows as it is asked.
    """

    hidden_RH: Tensor
    head_vH: Tensor
    partition: VocabPartition
    fidelity: Literal[Fidelity.FULL] = Fidelity.FULL
    made: list[Tensor] | None = field(default=None, repr=False, compare=False)
    """Where some rows, taken by `rows`, keep their logits once made: several questions, one matrix product.

    None on the signal of a whole micro-batch, which lives for a step and must not hold logits.
    """

    def rows(self, rows: slice) -> Full:
        """The same signal on some rows; shares storage."""
        return Full(hidden_RH=self.hidden_RH[rows], head_vH=self.head_vH, partition=self.partition, made=[])

    def shard(self, temperature: float) -> VocabShard:
        """This rank's teacher logits of these rows; [R, v] exists from here on, so call it on a chunk."""
        return VocabShard.of(self._logits(), self.partition, temperature)

    @torch.no_grad()
    def _logits(self) -> Tensor:
        if self.made:
            return self.made[0]
        logits_Rv = self.hidden_RH @ self.head_vH.t()
        if self.made is not None:
            self.made.append(logits_Rv)
        return logits_Rv


type TeacherSignal = Token | TopK | Full


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """Detached scalars per response token, one tensor per micro-batch, equal on all model-parallel ranks."""

    student_logp: tuple[Tensor, ...] | None = None
    """[R] each: the student's log-probs, from the engine or recomputed, as the objective asked; else None."""
    entropy: tuple[Tensor, ...] | None = None
    """[R] each: the student's entropy in nats over the whole vocabulary."""
    teacher_logp: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """By teacher's name, [R] each: its log-probs of the response tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything about a step that had to be known before the backward pass."""

    weights: Mapping[str, tuple[Tensor, ...]]
    """By name, one [R] tensor per micro-batch: the terms' weights, and any other constant per token that `loss` reads
    (advantages, earlier log-probs, shares of teachers)."""
    denominators: Mapping[str, float]
    """By term name: one global number."""
    metrics: tuple[Metric, ...] = ()

    def rows(self, micro: int, rows: slice) -> dict[str, Tensor]:
        """By name, what is planned for some rows of one micro-batch."""
        return {name: weights[micro][rows] for name, weights in self.weights.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One part of a loss: `sum(value_R * weight_R) / denominators[name]` over the whole step."""

    value_R: Tensor
    weight_R: Tensor


@dataclass(frozen=True, slots=True)
class Metric:
    """A named number; `total / count` is what is logged, so that means over ranks are exact."""

    name: str
    total: float
    count: float = 1.0

    @property
    def value(self) -> float:
        """NaN when nothing was counted."""
        return self.total / self.count if self.count else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What an optimizer step did."""

    metrics: tuple[Metric, ...]
    loss: float
    grad_norm: float
    lr: float
    skipped: bool
