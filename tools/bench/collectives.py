"""How many collectives one loss takes over a vocabulary that two ranks share: counted in a real world of two."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_distill.losses import backend
from megatron_distill.runtime.backend import choose
from megatron_distill.testing.collectives import counted
from megatron_distill.testing.world import Worlds
from megatron_distill.types import VocabPartition
from tools.bench import ours, rivals
from tools.bench.comparisons import LOGIT_LOSSES, MEGATRON, MEGATRON_FUSED
from tools.bench.work import Logits, Shape

EXPECTED = {"forward_kl": 2, "reverse_kl": 2, "jsd": 3, "logprob": 2, "logprob_entropy": 2, "top_k": 2}
"""Forward; none of them takes any backward."""
_RANKS = 2
_SHAPE = Shape(rows=7, vocab=512)

type Counts = dict[str, dict[str, int]]
"""By method: collectives `forward` and `backward`."""


def count() -> Counts:
    """Of all our losses, each backend, and of Megatron-Core's cross entropy; both ranks have to agree."""
    with tempfile.TemporaryDirectory() as folder, Worlds(Path(folder), limit=_RANKS) as worlds:
        found = worlds(_RANKS).run(_on_a_rank, timeout=300.0)
    assert all(one == found[0] for one in found), f"ranks took different numbers of collectives: {found}"
    return found[0]


def _on_a_rank() -> Counts:
    choose().prepare()
    width = _SHAPE.vocab // _RANKS
    columns = VocabPartition(start=dist.get_rank() * width, width=width, valid=_SHAPE.vocab, group=dist.group.WORLD)
    inputs = Logits(Shape(rows=_SHAPE.rows, vocab=width))
    found: Counts = {}
    kinds: tuple[backend.Name, ...] = ("eager", "compiled")
    for kind in kinds:
        backend.use(kind)
        for loss in LOGIT_LOSSES:
            label = loss if kind == "compiled" else f"{loss}, {kind}"
            found[label] = _count(ours.logit_loss(loss, columns), inputs)
    found[MEGATRON] = _count(rivals.megatron_cross_entropy(fused=False), inputs)
    found[MEGATRON_FUSED] = _count(rivals.megatron_cross_entropy(fused=True), inputs)
    return found


def _count(loss: Callable[[Logits], Any], inputs: Logits) -> dict[str, int]:
    inputs.restore()
    with counted() as forward:
        value = loss(inputs).sum()
    with counted() as backward:
        torch.autograd.grad(value, inputs.student_RV)
    return {"forward": forward.total(), "backward": backward.total()}
