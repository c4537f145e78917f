"""Scores of single responses become a signal on the student's response axis, the same bits on every rank."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.rollout.wire import Scores
from megatron_distill.runtime.mesh import Mesh
from megatron_distill.types import Batch, MicroBatch, Scored, TeacherSignal, Token, TopK

type Where = tuple[str, int]
"""Group and sample of a rollout."""


def where(one: Scored) -> Where:
    """Names a rollout within its step."""
    return one.rollout.group, one.rollout.sample


def on_responses(micro: MicroBatch, found: Mapping[Where, Scores], top_k: int, device: torch.device) -> Token | TopK:
    """The signal of one micro-batch; its sequences' scores lie end to end, as their tokens do in R."""
    parts = [found[where(one)] for one in micro.sequences]
    signal = _blank(micro.rows, top_k, device)
    columns: list[tuple[np.ndarray | None, ...]] = [
        (part.logprobs, part.top_ids, part.top_logprobs) if top_k else (part.logprobs,) for part in parts
    ]
    for values, pieces in zip(_tensors(signal), zip(*columns, strict=True), strict=False):
        values.copy_(torch.from_numpy(np.concatenate(pieces)))
    return signal


def leads(mesh: Mesh) -> bool:
    """Whether this rank is the one of its replica that gets the scores: others of the last stage have them from it."""
    return mesh.is_last_stage and mesh.groups.tp_cp.rank() == 0


def shared(
    batch: Batch, found: Mapping[Where, Scores] | None, top_k: int, mesh: Mesh, device: torch.device
) -> tuple[TeacherSignal, ...]:
    """One signal per micro-batch on every rank of the last stage, made by the leader of `found`; elsewhere none.

    Collective over the tensor and context parallel ranks of a stage. Context-parallel ranks hold all of R as well:
    each then reads its own rows.
    """
    if not mesh.is_last_stage:
        return ()
    signals = []
    for micro in batch.micro:
        if leads(mesh):
            assert found is not None
            signal = on_responses(micro, found, top_k, device)
        else:
            signal = _blank(micro.rows, top_k, device)
        if micro.rows and mesh.groups.tp_cp.size() > 1:
            for values in _tensors(signal):
                dist.broadcast(values, src=dist.get_global_rank(mesh.groups.tp_cp, 0), group=mesh.groups.tp_cp)
        signals.append(signal)
    return tuple(signals)


def _signal(logp_R: Tensor, ids_RK: Tensor, top_logp_RK: Tensor) -> Token | TopK:
    if ids_RK.shape[1] == 0:
        return Token(logp_R=logp_R)
    return TopK(logp_R=logp_R, ids_RK=ids_RK, top_logp_RK=top_logp_RK)


def _blank(rows: int, top_k: int, device: torch.device) -> Token | TopK:
    return _signal(
        torch.empty(rows, device=device),
        torch.empty(rows, top_k, dtype=torch.int64, device=device),
        torch.empty(rows, top_k, device=device),
    )


def _tensors(signal: Token | TopK) -> tuple[Tensor, ...]:
    return (signal.logp_R, signal.ids_RK, signal.top_logp_RK) if isinstance(signal, TopK) else (signal.logp_R,)
