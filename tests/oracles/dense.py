"""Dense float64 references, written from the mathematics: whole vocabularies, real columns only, plain autograd.

An oracle is a module `tests/oracles/<objective>.py` with

    FIELDS    a list of settings to try; {} first (the default), other temperatures, every variant
    TEACHERS  which teachers to try: an int is so many of them, a tuple of names is those; (0,) is none. What does not
              fit the settings is left out: without a teacher in `needs`, none; with one, at least one; the teachers
              that `teacher_weights` and `teacher_sources` name, if they do
    DATA      which sequences (`tests.certify.data`): "sampled" (default), "pairs", "mixed_origins",
              "constructed_groups", "revisions", or a function of the settings that says which
    STATES    objective states before the step, each laid over `initial()`, or a function of the settings that gives
              them; default: one, `initial()` itself
    one_micro_batch(fields)   optional: True where the loss is defined by its micro-batch; the oracle then speaks of a
              step in a single one
    oracle(step, fields)   the loss of the whole step as a float64 scalar, whose gradient in `step.student_RV` is the
              objective's. `fields` are all fields of the objective, defaults included
    scale(step, fields)   optional, for losses whose terms cancel, as advantages do: the sum of the magnitudes of what
              the loss adds up. An error of the loss is relative to it where it is above the loss

Nothing here, nor in an oracle, may be imported from `megatron_distill.losses` or `megatron_distill.objectives`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

STUDENT, TEACHER, CONSTRUCTED = 0, 1, 2
"""Values of `Step.origin_R`."""

type Clip = tuple[float | None, float | None]
"""Bounds of every vocabulary entry's contribution, before the sum."""


def _nothing() -> Tensor:
    return torch.empty(0)


def _no_draws(name: str, sequence: int) -> Tensor:
    raise AssertionError("this step has no randomness")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A whole training step, uncut: R runs over the response tokens of all sequences, one sequence after another.

    Log-probs "before the update" are detached functions of `student_RV`. All constants are float64.
    """

    student_RV: Tensor
    """float64 raw logits; the gradient is asked for."""
    teachers_RV: Mapping[str, Tensor]
    """float64 raw logits by teacher's name."""
    target_R: Tensor
    sequence_R: Tensor
    """Which sequence a token belongs to: 0 .. S-1, in the order of (group, sample)."""
    origin_R: Tensor = field(default_factory=_nothing)
    """`STUDENT`, `TEACHER` or `CONSTRUCTED`."""
    rollout_logp_R: Tensor = field(default_factory=_nothing)
    """The engine's log-probs, a little off the trainer's; NaN where the student did not write the token."""
    reward_S: Tensor = field(default_factory=_nothing)
    group_S: Tensor = field(default_factory=_nothing)
    """0 .. groups-1."""
    group_names: tuple[str, ...] = ()
    """By `group_S`: `<uid>/ref` holds the trajectories constructed for the rollouts of group `<uid>`."""
    sample_S: Tensor = field(default_factory=_nothing)
    """Index within the group. In pairs 0 is the chosen one, of reward 1."""
    stopped_S: Tensor = field(default_factory=_nothing)
    """True where the response ended by itself, False where it was cut off."""
    source_S: tuple[str, ...] = ()
    """Name of the data source of each sequence's prompt."""
    uniform: Callable[[str, int], Tensor] = _no_draws
    """(name, sequence) -> as many draws in [0, 1) as that sequence has response tokens: what
    `scope.uniform(length, name, index)` gives the objective, `index` that of `MicroBatch.index_S`."""
    number: int = 0
    """The step's number in the run: `Scope.step`."""
    state: Mapping[str, float] = field(default_factory=dict)
    """What the objective remembers from the steps before."""

    @property
    def sequences(self) -> range:
        """S of them."""
        return range(int(self.sequence_R.max()) + 1)

    def rows(self, sequence: int) -> Tensor:
        """Which of R are that sequence's, in order."""
        return (self.sequence_R == sequence).nonzero().flatten()

    def lengths_S(self) -> Tensor:
        """Response tokens of each sequence."""
        return torch.tensor([float(len(self.rows(sequence))) for sequence in self.sequences], dtype=torch.float64)

    def sums_S(self, value_R: Tensor) -> Tensor:
        """The sum over each sequence's tokens."""
        return torch.stack([value_R[self.rows(sequence)].sum() for sequence in self.sequences])

    def uniform_R(self, name: str) -> Tensor:
        """`uniform` of all sequences, one after another."""
        return torch.cat([self.uniform(name, sequence) for sequence in self.sequences]).double()

    def mean(self, value_R: Tensor, reduction: str, mask_R: Tensor | None = None) -> Tensor:
        """`token_mean`: over the masked tokens. `sequence_mean`: over the sequences with a masked token, of their mean
        per masked token. `sequence_sum`: over the same sequences, of their sum over masked tokens. No mask: all.
        """
        mask_R = torch.ones_like(value_R) if mask_R is None else mask_R.to(value_R)
        value_R = torch.where(mask_R > 0, value_R * mask_R, 0.0)
        if reduction == "token_mean":
            return value_R.sum() / max(float(mask_R.sum()), 1.0)
        assert reduction in ("sequence_mean", "sequence_sum"), reduction
        found = [(value_R[rows].sum(), float(mask_R[rows].sum())) for rows in map(self.rows, self.sequences)]
        parts = [total / count if reduction == "sequence_mean" else total for total, count in found if count > 0]
        return torch.stack(parts).mean() if parts else value_R.sum()

    def teacher_average(
        self,
        value_R: Mapping[str, Tensor],
        weights: Mapping[str, float] | None,
        sources: Mapping[str, str] | None = None,
    ) -> Tensor:
        """Equal shares, or shares in proportion to `weights`; with `sources`, the teacher of each sequence's source."""
        if sources:
            chosen = [sources[self.source_S[sequence]] for sequence in self.sequence_R.tolist()]
            return torch.stack([value_R[name][row] for row, name in enumerate(chosen)])
        shares = weights or dict.fromkeys(value_R, 1.0)
        total = sum(shares.values())
        return torch.stack([shares[name] / total * value for name, value in value_R.items()]).sum(0)


def log_softmax(logits_RV: Tensor, temperature: float) -> Tensor:
    """log of exp(z/T) over its sum, one row after another."""
    scaled = logits_RV / temperature
    return scaled - scaled.logsumexp(dim=-1, keepdim=True)


def expectation(p_RV: Tensor, value_RV: Tensor, clip: Clip = (None, None)) -> Tensor:
    """sum_v p_v value_v, where an id without probability counts nothing even if its value is infinite."""
    return clipped_sum(torch.where(p_RV > 0, p_RV * value_RV, 0.0), clip)


def clipped_sum(part_RV: Tensor, clip: Clip) -> Tensor:
    """Over ids, of contributions within bounds: beyond a bound they have no gradient."""
    return (part_RV if clip == (None, None) else part_RV.clamp(*clip)).sum(-1)


def forward_kl(student_RV: Tensor, teacher_RV: Tensor, temperature: float, clip: Clip = (None, None)) -> Tensor:
    """sum p (log p - log q)."""
    return divergence(student_RV, teacher_RV, temperature, "forward_kl", clip=clip)


def reverse_kl(student_RV: Tensor, teacher_RV: Tensor, temperature: float, clip: Clip = (None, None)) -> Tensor:
    """sum q (log q - log p)."""
    return divergence(student_RV, teacher_RV, temperature, "reverse_kl", clip=clip)


def jsd(student_RV: Tensor, teacher_RV: Tensor, temperature: float, beta: float, clip: Clip = (None, None)) -> Tensor:
    """beta sum p log(p/m) + (1-beta) sum q log(q/m), m = beta p + (1-beta) q; the two KLs at its ends."""
    return divergence(student_RV, teacher_RV, temperature, "jsd", beta, clip)


def divergence(
    student_RV: Tensor,
    teacher_RV: Tensor,
    temperature: float,
    name: str,
    parameter: float = 0.0,
    clip: Clip = (None, None),
) -> Tensor:
    """Any of the divergences over the whole vocabulary: [R] in nats."""
    log_q, log_p = log_softmax(student_RV, temperature), log_softmax(teacher_RV, temperature)
    return clipped_sum(contributions(log_q, log_p, name, parameter), clip)


def contributions(log_q: Tensor, log_p: Tensor, name: str, parameter: float = 0.0) -> Tensor:
    """What each entry adds to the divergence of student q and teacher p; q and p need not sum to 1.

    jsd: `parameter` weights the teacher. skew: alpha, which weights the distribution that the KL starts from.
    mixed_kl: the weight of the forward KL.
    """
    q, p = log_q.exp(), log_p.exp()

    def ratio(weight: Tensor, over: Tensor, under: Tensor) -> Tensor:
        return torch.where(weight > 0, weight * (over - under), 0.0)

    if name == "jsd" and parameter in (0, 1):
        name = "forward_kl" if parameter == 0 else "reverse_kl"
    if name == "forward_kl":
        return ratio(p, log_p, log_q)
    if name == "reverse_kl":
        return ratio(q, log_q, log_p)
    if name == "jsd":
        log_m = (parameter * p + (1 - parameter) * q).log()
        return parameter * ratio(p, log_p, log_m) + (1 - parameter) * ratio(q, log_q, log_m)
    if name == "skew_forward_kl":
        return ratio(p, log_p, (parameter * p + (1 - parameter) * q).log())
    if name == "skew_reverse_kl":
        return ratio(q, log_q, (parameter * q + (1 - parameter) * p).log())
    if name == "mixed_kl":
        return parameter * ratio(p, log_p, log_q) + (1 - parameter) * ratio(q, log_q, log_p)
    assert name == "total_variation", name
    return (q - p).abs() / 2


def top_ids(logits_RV: Tensor, k: int) -> Tensor:
    """The k likeliest ids [R, K]; the lowest id first among equals."""
    return logits_RV.argsort(dim=-1, descending=True, stable=True)[:, :k]


def top_k_divergence(
    student_RV: Tensor,
    teacher_RV: Tensor,
    temperature: float,
    k: int,
    name: str,
    parameter: float = 0.0,
    outside: str = "tail",
    clip: Clip = (None, None),
) -> Tensor:
    """A divergence that knows the teacher's k likeliest ids only: [R].

    tail: all other ids are one more entry, for both. renormalise: both are conditioned on the k ids.
    renormalise_teacher: the teacher is, the student is not. truncate: neither, the sum runs over the k ids.
    """
    ids_RK = top_ids(teacher_RV, k)
    log_q = log_softmax(student_RV, temperature).gather(-1, ids_RK)
    log_p = log_softmax(teacher_RV, temperature).gather(-1, ids_RK)
    if outside == "tail":
        rest_RV = torch.ones_like(teacher_RV, dtype=torch.bool).scatter(-1, ids_RK, False)

        def with_rest(logits_RV: Tensor, top_RK: Tensor) -> Tensor:
            others = log_softmax(logits_RV, temperature).masked_fill(~rest_RV, float("-inf"))
            return torch.cat([top_RK, others.logsumexp(-1, keepdim=True)], dim=-1)

        if k < teacher_RV.shape[-1]:
            log_q, log_p = with_rest(student_RV, log_q), with_rest(teacher_RV, log_p)
    elif outside == "renormalise":
        log_q = log_q - log_q.logsumexp(-1, keepdim=True)
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    elif outside == "renormalise_teacher":
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    else:
        assert outside == "truncate", outside
    return clipped_sum(contributions(log_q, log_p, name, parameter), clip)


def entropy(logits_RV: Tensor, temperature: float) -> Tensor:
    """-sum q log q."""
    log_q = log_softmax(logits_RV, temperature)
    return -expectation(log_q.exp(), log_q)


def logprob(logits_RV: Tensor, ids_R: Tensor, temperature: float) -> Tensor:
    """log q(id)."""
    return log_softmax(logits_RV, temperature)[torch.arange(len(ids_R)), ids_R]


def group_advantages(reward_S: Tensor, group_S: Tensor, *, divide_by_std: bool = True, epsilon: float = 1e-6) -> Tensor:
    """(r - mean) / (std + epsilon) within each group, std over n - 1; 0 in a group of one."""
    advantage_S = torch.zeros_like(reward_S, dtype=torch.float64)
    for group in group_S.unique():
        mine = group_S == group
        if mine.sum() > 1:
            rewards = reward_S[mine].double()
            spread = rewards.std(unbiased=True) + epsilon if divide_by_std else 1.0
            advantage_S[mine] = (rewards - rewards.mean()) / spread
    return advantage_S


def with_value(surrogate: Tensor, value: Tensor) -> Tensor:
    """The gradient of `surrogate`, the value of `value`."""
    return surrogate - surrogate.detach() + value.detach()
