"""REDI: over pairs, the mean of -(mean log-prob of the chosen) + alpha (mean log-prob of the rejected)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles import dense

DATA = "pairs"
FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3},
    {"alpha": 0.0},
    {"alpha": 1.0, "monitor": True},
    {"alpha": 0.5, "mask_common_prefix": True, "temperature": 1.3},
    {"rejected_decay": 0.7},
    {"rejected_decay": 1.5, "mask_common_prefix": True},
]
TEACHERS = (0,)


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    log_q = dense.logprob(step.student_RV, step.target_R, fields["temperature"])
    losses = []
    for group in step.group_S.unique().tolist():
        chosen, rejected = pair(step, group)
        first = common_prefix(step, chosen, rejected) if fields["mask_common_prefix"] else 0
        means = []
        for sequence in (chosen, rejected):
            rows = step.rows(sequence)[first:]
            means.append(log_q[rows].sum() / max(len(rows), 1))
        weight = torch.exp(fields["rejected_decay"] * means[1].detach())
        losses.append(-means[0] + fields["alpha"] * weight * means[1])
    return torch.stack(losses).mean()


def pair(step: dense.Step, group: int) -> tuple[int, int]:
    """The sequences of a group with reward 1 and 0."""
    members = [sequence for sequence in step.sequences if int(step.group_S[sequence]) == group]
    rewards = {float(step.reward_S[sequence]): sequence for sequence in members}
    assert len(members) == 2, "a pair"
    return rewards[1.0], rewards[0.0]


def common_prefix(step: dense.Step, one: int, other: int) -> int:
    """How many tokens two responses share at their start."""
    first, second = (step.target_R[step.rows(sequence)].tolist() for sequence in (one, other))
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    return count
