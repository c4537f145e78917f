"""A fixed model beside the student, in the same mesh: any size, any family with the student's tokenizer.

Its vocabulary may be padded otherwise than the student's. So that both are compared column by column, its output
weight is laid out once, at the start, on the student's partition; columns that either model lacks get no probability.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.models.network import Network
from megatron_distill.models.student import Student
from megatron_distill.teachers._megatron import MegatronTeacher
from megatron_distill.teachers._views import View
from megatron_distill.teachers.base import TeacherPart
from megatron_distill.types import Fidelity, VocabPartition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenPart(TeacherPart):
    """A Megatron model in the student's mesh whose weights never change."""

    model: Path
    """Hugging Face folder of the teacher."""
    trust_remote_code: bool = False
    """Let the folder's own Python build its tokenizer; the model itself never runs code of the folder."""
    view: View = field(default_factory=View)
    """What it reads before the response."""

    @property
    def provides(self) -> Fidelity:
        """All of it."""
        return Fidelity.FULL

    @property
    def folder(self) -> Path:
        """Where its tokenizer lies."""
        return self.model

    def connect(
        self, student: Student, tokenizer: PreTrainedTokenizerBase, logs: Path | None = None
    ) -> MegatronTeacher:
        """Load the weights on every rank of the mesh."""
        runtime, partition = student.network.runtime, student.partition
        network = Network.load(self.model, runtime, valid_vocab=partition.valid)
        network.module.requires_grad_(False)
        head = relaid_head(network, partition) if runtime.mesh.is_last_stage else None
        return MegatronTeacher(network=network, head=head, partition=partition, view=self.view, tokenizer=tokenizer)


@torch.no_grad()
def relaid_head(network: Network, partition: VocabPartition) -> Tensor:
    """The output weight's rows for the columns of `partition`, zero where the model has none; collective over tp."""
    shard = network.head().detach()
    if network.partition.start == partition.start and network.partition.width == partition.width:
        return shard
    tp = network.runtime.mesh.sizes.tp
    shards = [torch.empty_like(shard) for _ in range(tp)]
    if tp > 1:
        dist.all_gather(shards, shard.contiguous(), group=network.partition.group)
    else:
        shards = [shard]
    laid = shard.new_zeros(partition.width, shard.shape[1])
    mine = torch.cat(shards)[partition.start : partition.start + partition.width]
    laid[: len(mine)] = mine
    return laid
