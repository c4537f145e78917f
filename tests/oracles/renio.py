"""ReNIO: OPSD's divergence, every sequence weighted by how much surer than its teacher the student was of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles import dense
from tests.oracles._supervised import BY_SOURCE, TOP_K
from tests.oracles.opsd import token_values

FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.1, "threshold": 0.8, "ceiling": 2.5, "threshold_counts": True},
    {"threshold": 0.01, "ceiling": 2.0, "weight_temperature": 0.5, "clip_low": None, "reduction": "token_mean"},
    {"divergence": "jsd", "clip_low": None, "clip_high": None, **BY_SOURCE},
    {"normalise": "clamped_mean", "ceiling": 4.0, "teacher_weights": {"big": 3.0, "small": 1.0}},
    {"normalise": "running_mean", "temperature": 1.3},
    {"normalise": "none", "divergence": "reverse_kl"},
    {"mean_over": "micro_batch", "ceiling": 2.5},
    {"largest": 1.2, **TOP_K[0]},
    {"divergence": "sampled_token", "temperature": 1.3},
    # A threshold that no token comes up to: all weights are 1.
    {"threshold": 60.0, "ceiling": 61.0},
]
TEACHERS = (1, 2)


def STATES(fields: Mapping[str, Any]) -> tuple[dict[str, float], ...]:
    """With a running mean, the first step and a later one."""
    return ({}, {"weight_mean": 2.5}) if fields["normalise"] == "running_mean" else ({},)


def one_micro_batch(fields: Mapping[str, Any]) -> bool:
    """Means over micro-batches depend on how the step is cut into them."""
    return bool(fields["mean_over"] == "micro_batch")


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    weight_S = weights(step, fields)
    value_R = token_values(step, fields)
    return step.mean(weight_S[step.sequence_R] * value_R, fields["reduction"])


def weights(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    """w^ of each sequence, constant: [S]. Means are over the whole step, or over its one micro-batch, which is that."""
    temperature = fields["temperature"]
    log_p = step.teacher_average(
        {name: dense.logprob(logits, step.target_R, temperature) for name, logits in step.teachers_RV.items()},
        fields["teacher_weights"],
        fields["teacher_sources"],
    )
    surer_R = dense.logprob(step.student_RV, step.target_R, temperature).detach() - log_p
    found = []
    for sequence in step.sequences:
        threshold = fields["threshold"]
        chosen = [
            min(value, fields["ceiling"])
            for value in surer_R[step.rows(sequence)].tolist()
            if value > threshold or (fields["threshold_counts"] and value == threshold)
        ]
        found.append(sum(chosen) / len(chosen) if chosen else 0.0)
    weight_S = (torch.tensor(found, dtype=torch.float64) / fields["weight_temperature"]).exp()
    match fields["normalise"]:
        case "mean":
            return (weight_S / weight_S.mean()).clamp(max=fields["largest"])
        case "clamped_mean":
            bounded_S = weight_S.clamp(0.1, 10.0)
            return bounded_S / bounded_S.mean()
        case "running_mean":
            mean = weight_S.mean()
            return weight_S / (0.1 * mean + 0.9 * step.state.get("weight_mean", mean))
    assert fields["normalise"] == "none"
    return weight_S
