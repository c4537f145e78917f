"""TrOPD: each sampled token is trusted or not by a draw; three kinds of tokens, one mean over all tokens.

trusted   -(q/q_old) (log p - log q_old)       outlier   a forward KL of the teacher's top-k, nothing, or clipped
teacher's   -beta log q
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles import dense
from tests.oracles.opd import compared, ratio, sampled_logprobs

FIELDS: list[dict[str, Any]] = [
    {},
    {"guidance": 0.3, "top_k": 5},
    {"guidance": 0.3, "top_k": 5, "temperature": 1.3, "reduction": "sequence_mean"},
    {"guidance": 0.3, "top_k": 6, "outside": "renormalise"},
    {"guidance": 0.3, "top_k": 6, "outside": "renormalise_teacher"},
    {"guidance": 0.3, "top_k": 6, "outside": "tail", "reduction": "sequence_sum"},
    {"guidance": 0.3, "support": "full", "temperature": 0.8},
    {"guidance": 0.3, "outlier": "mask"},
    {"guidance": 0.3, "outlier": "clip", "temperature": 1.3},
    {"guidance": 0.3, "outlier": "clip", "clip_floor": -0.3, "old_logprobs": "rollout"},
    {"guidance": 0.3, "outlier": "clip", "old_logprobs": "rollout", "ratio_limit": 1.02},
    {"guidance": 0.3, "top_k": 5, "old_logprobs": "rollout"},
    {"guidance": 0.3, "top_k": 5, "teacher_weights": {"big": 1.0, "small": 3.0}},
    {"guidance": 0.3, "top_k": 5, "teacher_sources": {"math": "big", "code": "small"}},
]
TEACHERS = (1, 2)
DATA = "mixed_origins"


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    log_q, old, log_p = sampled_logprobs(step, fields)
    advantage, weight = log_p - old, ratio(log_q, old, fields)
    sampled = step.origin_R == dense.STUDENT
    trusted = sampled & (step.uniform_R("trust") < torch.minimum(log_p.exp() / old.exp(), torch.ones_like(old)))
    outlier = torch.zeros_like(log_q)
    if fields["outlier"] == "clip":
        outlier = -weight * advantage.clamp(min=fields["clip_floor"])
    elif fields["outlier"] == "forward_kl":
        outlier = compared(step, fields, "forward_kl")
    value_R = torch.where(sampled, torch.where(trusted, -weight * advantage, outlier), -fields["guidance"] * log_q)
    return step.mean(value_R, fields["reduction"])
