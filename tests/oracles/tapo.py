"""TAPO: the clipped objective on originals plus a token-weighted one on constructed trajectories, groups apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles import dense, grpo

FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "old_logprobs": "rollout", "clip_low": 0.05, "clip_high": 0.1},
    {"reference_scope": "batch", "constructed_weight": 0.5, "kl_weight": 0.1},
    {"lone_reference": "reward", "normalise": "joint", "old_logprobs": "rollout"},
    {"reduction": "sequence_mean", "normalise": "joint", "temperature": 0.7, "divide_by_std": False},
    {"reduction": "constant", "max_length": 9, "lone_reference": "reward", "drop_uniform_groups": True},
    {"lowest_weight": 0.5, "highest_weight": 1.5, "baseline": "leave_one_out", "drop_uniform_groups": True},
    {"mask_truncated": True, "normalise": "joint", "reference_scope": "batch"},
    {"overlong_buffer": 4, "overlong_penalty": 0.5, "max_length": 8, "lone_reference": "reward"},
    {"old_logprobs": "rollout", "clip_low": 0.02, "dual_clip": 1.05, "mask_truncated": True},
]
TEACHERS = (("reference",),)
DATA = "constructed_groups"


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    return mean(step, *values(step, fields), fields)


def scale(step: dense.Step, fields: Mapping[str, Any]) -> float:
    """Advantages of a group cancel, so that the loss is far smaller than what it adds up."""
    value_R, *masks = values(step, fields)
    return float(mean(step, value_R.detach().abs(), *masks, fields))


def values(step: dense.Step, fields: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What each token adds to its mean, whether it counts, and whether it was constructed: [R] each."""
    built_S = torch.tensor([bool((step.origin_R[step.rows(one)] == dense.CONSTRUCTED).all()) for one in step.sequences])
    built_R = built_S[step.sequence_R]
    # Constructed trajectories have groups of their own; compared across the batch, they are one group more.
    group_S = step.group_S.clone()
    if fields["reference_scope"] == "batch":
        group_S[built_S] = int(group_S.max()) + 1
    shaped_S = step.reward_S - grpo.penalties(step, fields)
    advantage_S = grpo.advantages(shaped_S, group_S, fields)
    keep_S = torch.ones_like(step.reward_S)
    for sequence in step.sequences:
        rewards = step.reward_S[group_S == group_S[sequence]]
        alone = len(rewards) == 1 and bool(built_S[sequence]) and fields["lone_reference"] == "reward"
        if alone:
            advantage_S[sequence] = shaped_S[sequence]
        elif fields["drop_uniform_groups"] and bool((rewards == rewards[0]).all()):
            keep_S[sequence] = 0
        if fields["mask_truncated"] and not step.stopped_S[sequence]:
            keep_S[sequence] = 0
    before_R = dense.logprob(step.student_RV, step.target_R, fields["temperature"]).detach()
    weight_R = (before_R + dense.entropy(step.student_RV, fields["temperature"]).detach()).exp()
    weight_R = weight_R.clamp(fields["lowest_weight"], fields["highest_weight"])
    weight_R = torch.where(built_R, fields["constructed_weight"] * weight_R, 1.0)
    old_R = torch.where(built_R, before_R, grpo.old_logprobs(step, fields))
    value_R = weight_R * grpo.policy(step, advantage_S[step.sequence_R], old_R, fields)
    if fields["kl_weight"]:
        value_R = value_R + torch.where(built_R, 0.0, fields["kl_weight"] * grpo.k3(step, fields))
    return value_R, keep_S[step.sequence_R], built_R


def mean(step: dense.Step, value_R: Tensor, keep_R: Tensor, built_R: Tensor, fields: Mapping[str, Any]) -> Tensor:
    """A mean over all tokens, or one over originals plus one over constructed ones."""
    if fields["normalise"] == "joint":
        return grpo.mean(step, value_R, keep_R, fields)
    originals = grpo.mean(step, value_R, keep_R * ~built_R, fields)
    return originals + grpo.mean(step, value_R, keep_R * built_R, fields)
