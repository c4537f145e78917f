"""OPSD: the mean of a divergence whose entries are clipped; by the sampled token it is the reverse KL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.oracles import dense
from tests.oracles._supervised import BY_SOURCE, TOP_K, compared, sampled

FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.1, "clip_low": 0.0, "reduction": "token_mean"},
    {"clip_high": None, "teacher_weights": {"big": 3.0, "small": 1.0}},
    {"divergence": "jsd", "clip_high": None, "temperature": 1.1, "reduction": "token_mean"},
    {"divergence": "jsd", "beta": 0.3, "clip_high": 0.01},
    {"divergence": "reverse_kl", "clip_low": -0.02, **BY_SOURCE},
    *TOP_K,
    {"divergence": "sampled_token", "temperature": 1.3},
]
TEACHERS = (1, 2)


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    return step.mean(token_values(step, fields), fields["reduction"])


def token_values(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    """The divergence of every token: [R]."""
    if fields["divergence"] == "sampled_token":
        return sampled(step, fields, "reverse_kl")
    clip = fields["clip_low"], fields["clip_high"]
    return compared(step, fields, fields["divergence"], fields["beta"], clip)
