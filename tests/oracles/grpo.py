"""GRPO, DAPO, Dr.GRPO: PPO's clipped objective on advantages within groups, less a KL to the reference.

The value is that of the clipped objective itself, whose gradient autograd takes. The KL is k3's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles import dense

FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "clip_low": 0.05, "clip_high": 0.1},
    {"reduction": "token_mean", "old_logprobs": "recompute", "kl_weight": 0.1, "temperature": 0.8},
    {"kl_weight": 0.5, "baseline": "leave_one_out"},
    {  # DAPO
        "reduction": "token_mean",
        "clip_low": 0.02,
        "clip_high": 0.28,
        "dual_clip": 1.05,
        "drop_uniform_groups": True,
        "mask_truncated": True,
        "overlong_buffer": 4,
        "overlong_penalty": 0.5,
        "max_length": 8,
    },
    {"drop_uniform_groups": True},
    {"mask_truncated": True},
    # Dr.GRPO
    {"divide_by_std": False, "reduction": "constant", "max_length": 9},
    {"reduction": "constant", "max_length": 9, "mask_truncated": True, "drop_uniform_groups": True},
]
TEACHERS = (("reference",),)


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    return mean(step, values(step, fields), counted(step, fields)[step.sequence_R], fields)


def scale(step: dense.Step, fields: Mapping[str, Any]) -> float:
    """Advantages of a group cancel, so that the loss is far smaller than what it adds up."""
    return float(mean(step, values(step, fields).detach().abs(), counted(step, fields)[step.sequence_R], fields))


def values(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    """What each token adds to the mean, [R]."""
    advantage_S = advantages(step.reward_S - penalties(step, fields), step.group_S, fields)
    value_R = policy(step, advantage_S[step.sequence_R], old_logprobs(step, fields), fields)
    return value_R + fields["kl_weight"] * k3(step, fields) if fields["kl_weight"] else value_R


def advantages(reward_S: Tensor, group_S: Tensor, fields: Mapping[str, Any]) -> Tensor:
    """(r - baseline) / (std + 1e-6); 0 in groups of one and in groups of equal rewards."""
    found_S = torch.zeros_like(reward_S)
    for place in range(len(reward_S)):
        mine = [float(reward_S[other]) for other in range(len(reward_S)) if group_S[other] == group_S[place]]
        if len(mine) < 2:
            continue
        average = sum(mine) / len(mine)
        spread = (sum((reward - average) ** 2 for reward in mine) / (len(mine) - 1)) ** 0.5
        if fields["baseline"] == "leave_one_out":
            average = (sum(mine) - float(reward_S[place])) / (len(mine) - 1)
        found_S[place] = (reward_S[place] - average) / (spread + 1e-6 if fields["divide_by_std"] else 1.0)
    return found_S


def penalties(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    """DAPO's soft overlong punishment: 0 up to max_length - buffer tokens, then linear, whole from max_length on."""
    buffer, longest = fields["overlong_buffer"], fields["max_length"]
    if not buffer:
        return torch.zeros_like(step.reward_S)
    found = []
    for length in step.lengths_S().tolist():
        if length <= longest - buffer:
            found.append(0.0)
        elif length <= longest:
            found.append((length - (longest - buffer)) / buffer)
        else:
            found.append(1.0)
    return fields["overlong_penalty"] * torch.tensor(found, dtype=torch.float64)


def counted(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    """Which sequences are in the loss, [S]."""
    keep_S = torch.ones_like(step.reward_S)
    for sequence in step.sequences:
        rewards = step.reward_S[step.group_S == step.group_S[sequence]]
        if fields["drop_uniform_groups"] and bool((rewards == rewards[0]).all()):
            keep_S[sequence] = 0
        if fields["mask_truncated"] and not step.stopped_S[sequence]:
            keep_S[sequence] = 0
    return keep_S


def old_logprobs(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    """The engine's, or the student's before the update."""
    if fields["old_logprobs"] == "rollout":
        return step.rollout_logp_R
    return dense.logprob(step.student_RV, step.target_R, fields["temperature"]).detach()


def policy(step: dense.Step, advantage_R: Tensor, old_R: Tensor, fields: Mapping[str, Any]) -> Tensor:
    """max(-A rho, -A clip(rho)); for A < 0 at most -A dual_clip."""
    ratio_R = (dense.logprob(step.student_RV, step.target_R, fields["temperature"]) - old_R).exp()
    bounded_R = ratio_R.clamp(1 - fields["clip_low"], 1 + fields["clip_high"])
    value_R = -torch.where(
        advantage_R * ratio_R < advantage_R * bounded_R, advantage_R * ratio_R, advantage_R * bounded_R
    )
    if fields["dual_clip"] is None:
        return value_R
    ceiling_R = -advantage_R * fields["dual_clip"]
    return torch.where((advantage_R < 0) & (value_R > ceiling_R), ceiling_R, value_R)


def k3(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    """exp(-d) - 1 + d, d = log q(y) - log ref(y)."""
    mine_R = dense.logprob(step.student_RV, step.target_R, fields["temperature"])
    difference_R = mine_R - dense.logprob(step.teachers_RV["reference"], step.target_R, fields["temperature"])
    return (-difference_R).exp() - 1 + difference_R


def mean(step: dense.Step, value_R: Tensor, mask_R: Tensor, fields: Mapping[str, Any]) -> Tensor:
    """Over counted tokens; `constant` divides by sequences that count, and by max_length."""
    value_R = torch.where(mask_R > 0, value_R, 0.0)
    if fields["reduction"] != "constant":
        return step.mean(value_R, fields["reduction"], mask_R)
    sequences = sum(float(mask_R[step.rows(sequence)].sum() > 0) for sequence in step.sequences)
    return value_R.sum() / (max(sequences, 1.0) * fields["max_length"])
