"""From per-token terms to the one scalar that is differentiated, and the numbers that are logged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_distill.types import Term


def reduce(terms: Mapping[str, Term], denominators: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar sum over terms of sum(value * weight) / denominator, and `loss/<term>` for each, detached.

    Denominators speak of the whole step, so scalars and sums of row chunks, micro-batches and data-parallel ranks
    add up to those of the step: nothing is ever averaged.
    """
    assert terms, "an objective returned no terms"
    assert terms.keys() <= denominators.keys(), f"terms {sorted(terms)} without a denominator: {sorted(denominators)}"
    parts = {
        name: (term.value_R * term.weight_R.to(term.value_R.dtype)).sum() / denominators[name]
        for name, term in terms.items()
    }
    return torch.stack(list(parts.values())).sum(), {f"loss/{name}": part.detach() for name, part in parts.items()}
