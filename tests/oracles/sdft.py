"""SDFT: the mean of a divergence of student and teacher; by the sampled token it is the reverse KL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.oracles import dense
from tests.oracles._supervised import BY_SOURCE, TOP_K, compared, sampled

FIELDS: list[dict[str, Any]] = [
    {},
    {"divergence": "reverse_kl", "temperature": 1.3, "reduction": "sequence_mean"},
    {"divergence": "jsd", "beta": 0.3, **BY_SOURCE},
    *({"divergence": "forward_kl", **fields} for fields in TOP_K),
    {"divergence": "reverse_kl", **TOP_K[0]},
    {"divergence": "jsd", **TOP_K[1]},
    {"divergence": "sampled_token", "temperature": 1.3},
]
TEACHERS = (1, 2)


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    if fields["divergence"] == "sampled_token":
        value_R = sampled(step, fields, "reverse_kl")
    else:
        value_R = compared(step, fields, fields["divergence"], fields["beta"])
    return step.mean(value_R, fields["reduction"])
