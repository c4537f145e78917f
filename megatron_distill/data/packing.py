"""Scored rollouts become packed micro-batches with a response axis R.

Packing does not depend on the order of arrival: sequences are numbered by (group, sample), every rank makes the
same assignment and builds its own share. Costs are counted in tokens, padding included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_distill.errors import DataError
from megatron_distill.types import Batch, Counts, MicroBatch, Rollout, Scored

NOTHING = float("nan")
"""Where there is no reward or no log-prob."""


@dataclass(frozen=True, slots=True)
class _Sequence:
    """A scored rollout and its place in the step."""

    scored: Scored
    index: int
    group: int
    width: int
    """Tokens it takes in T: prompt + response - 1, padded."""


def pack(
    scored: Sequence[Scored],
    *,
    dp_rank: int,
    dp_size: int,
    tokens_per_micro_batch: int,
    sequence_multiple: int = 1,
    total_multiple: int = 1,
    device: torch.device,
    version: int,
) -> Batch:
    """This data-parallel rank's micro-batches; `scored` is the whole step and equal on all ranks.

    Every rank gets the same number of micro-batches. One without sequences has no rows, and a few padding tokens
    as a single segment. A sequence over `tokens_per_micro_batch` sits alone in its micro-batch.

    Args:
        sequence_multiple: each sequence is padded at its end to a multiple of it (context parallel cuts).
        total_multiple: T is padded to a multiple of it, in the last sequence (sequence parallel, FP8).

    Raises:
        DataError: no rollouts, an empty response, or two rollouts with the same group and sample.
    """
    sequences = _number(scored, sequence_multiple)
    shares = [_fill(share, tokens_per_micro_batch) for share in _balance(sequences, dp_size)]
    num_micro = max(len(share) for share in shares)
    mine = shares[dp_rank] + [[]] * (num_micro - len(shares[dp_rank]))
    multiple = math.lcm(sequence_multiple, total_multiple)
    return Batch(
        micro=tuple(_micro_batch(chosen, multiple, device) for chosen in mine),
        counts=Counts(
            tokens=sum(len(one.scored.rollout.tokens) for one in sequences),
            sequences=len(sequences),
            groups=len({one.group for one in sequences}),
        ),
        version=version,
        temperature=_temperature(scored),
    )


def _temperature(scored: Sequence[Scored]) -> float | None:
    found = {one.rollout.temperature for one in scored if one.rollout.logprobs is not None}
    return found.pop() if len(found) == 1 else None


def _number(scored: Sequence[Scored], multiple: int) -> list[_Sequence]:
    """Canonical order, whatever order they came in."""
    if not scored:
        raise DataError("no rollouts to pack; the source gave an empty step")
    ordered = sorted(scored, key=lambda one: (one.rollout.group, one.rollout.sample))
    groups: dict[str, int] = {}
    numbered: list[_Sequence] = []
    for index, one in enumerate(ordered):
        _check(one, ordered[index - 1] if index else None)
        group = groups.setdefault(one.rollout.group, len(groups))
        width = len(one.rollout.prompt.tokens) + len(one.rollout.tokens) - 1
        numbered.append(_Sequence(one, index, group, _up(width, multiple)))
    return numbered


def _check(one: Scored, before: Scored | None) -> None:
    rollout = one.rollout
    where = f"rollout {rollout.sample} of group {rollout.group} (prompt {rollout.prompt.id})"
    if not rollout.tokens:
        raise DataError(f"{where}: the response is empty; leave such rollouts out of the step")
    if not rollout.prompt.tokens:
        raise DataError(f"{where}: the prompt has no tokens; nothing predicts the first response token")
    lengths = {len(rollout.tokens), len(rollout.origin), len(_logprobs(rollout))}
    if len(lengths) > 1:
        raise DataError(f"{where}: tokens, origin and logprobs must have one length")
    if before and (before.rollout.group, before.rollout.sample) == (rollout.group, rollout.sample):
        raise DataError(f"{where}: comes twice in one step")


def _balance(sequences: list[_Sequence], dp_size: int) -> list[list[_Sequence]]:
    """Longest first, each to the rank with the fewest tokens so far."""
    shares: list[list[_Sequence]] = [[] for _ in range(dp_size)]
    loads = [0] * dp_size
    for one in _longest_first(sequences):
        rank = loads.index(min(loads))
        shares[rank].append(one)
        loads[rank] += one.width
    return shares


def _fill(share: list[_Sequence], budget: int) -> list[list[_Sequence]]:
    """First fit decreasing into micro-batches of `budget` tokens."""
    chosen: list[list[_Sequence]] = []
    room: list[int] = []
    for one in _longest_first(share):
        place = next((place for place, left in enumerate(room) if one.width <= left), len(room))
        if place == len(room):
            chosen.append([])
            room.append(budget)
        chosen[place].append(one)
        room[place] -= one.width
    return [sorted(members, key=lambda one: one.index) for members in chosen]


def _longest_first(sequences: list[_Sequence]) -> list[_Sequence]:
    return sorted(sequences, key=lambda one: (-one.width, one.index))


def _micro_batch(chosen: list[_Sequence], multiple: int, device: torch.device) -> MicroBatch:
    widths = [one.width for one in chosen]
    total = max(_up(sum(widths), multiple), multiple)
    # the last sequence takes the padding of the whole; without sequences one dummy segment does
    widths = [*widths[:-1], total - sum(widths[:-1])]
    starts = [0]
    for width in widths:
        starts.append(starts[-1] + width)
    tokens: list[int] = []
    rows: list[int] = []
    for one, start, width in zip(chosen, starts, widths, strict=False):
        prompt, response = one.scored.rollout.prompt.tokens, one.scored.rollout.tokens
        padding = width - len(prompt) - len(response) + 1
        tokens.extend((*prompt, *response[:-1], *[0] * padding))
        first = start + len(prompt) - 1  # the last prompt token predicts the first response token
        rows.extend(range(first, first + len(response)))
    rollouts = [one.scored.rollout for one in chosen]

    def integers(values: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def floats(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return MicroBatch(
        input_T=integers(tokens or [0] * total),
        position_T=integers([position for width in widths for position in range(width)]),
        cu_seqlens=integers(starts, torch.int32),
        response_R=integers(rows),
        target_R=integers([token for rollout in rollouts for token in rollout.tokens]),
        segment_R=integers([segment for segment, rollout in enumerate(rollouts) for _ in rollout.tokens]),
        origin_R=integers([origin for rollout in rollouts for origin in rollout.origin], torch.int8),
        version_R=integers([version for rollout in rollouts for version in rollout.versions]),
        rollout_logp_R=floats([value for rollout in rollouts for value in _logprobs(rollout)]),
        reward_S=floats([NOTHING if one.scored.reward is None else one.scored.reward for one in chosen]),
        group_S=integers([one.group for one in chosen]),
        index_S=integers([one.index for one in chosen]),
        sequences=tuple(one.scored for one in chosen),
    )


def _logprobs(rollout: Rollout) -> Sequence[float]:
    return [NOTHING] * len(rollout.tokens) if rollout.logprobs is None else rollout.logprobs


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
