"""DistiLLM: the mean of KL(p || alpha p + (1-alpha) q) or of KL(q || alpha q + (1-alpha) p)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.oracles import dense
from tests.oracles._supervised import BY_SOURCE, TOP_K, compared, sampled

FORWARD: dict[str, Any] = {"divergence": "skew_forward_kl"}
REVERSE: dict[str, Any] = {"divergence": "skew_reverse_kl"}
FIELDS: list[dict[str, Any]] = [
    {},
    {**FORWARD, "temperature": 1.3, "reduction": "sequence_mean"},
    {**REVERSE, "temperature": 1.3, "reduction": "sequence_mean"},
    {**FORWARD, "alpha": 0.5, **BY_SOURCE},
    {**FORWARD, "alpha": 0.0},
    {**REVERSE, "alpha": 0.0},
    {**FORWARD, **TOP_K[0]},
    {**REVERSE, **TOP_K[1]},
    {**FORWARD, "sampled_token": True, "temperature": 1.3},
    {**REVERSE, "sampled_token": True},
]
TEACHERS = (1, 2)


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    judged = sampled if fields["sampled_token"] else compared
    return step.mean(judged(step, fields, fields["divergence"], fields["alpha"]), fields["reduction"])
