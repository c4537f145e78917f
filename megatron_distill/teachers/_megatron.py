"""A teacher that is a Megatron model in the student's mesh: it reads its view and answers on the student's axis R."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_distill.data.packing import pack
from megatron_distill.models.network import Network
from megatron_distill.models.student import Student
from megatron_distill.teachers._views import View
from megatron_distill.types import Batch, Full, MicroBatch, Scored, TeacherSignal, VocabPartition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True, kw_only=True)
class MegatronTeacher:
    """A network that judges; whose weights they are is its maker's affair."""

    network: Network
    head: Tensor | None
    """[v, H] on the student's partition; None where no logits are seen."""
    partition: VocabPartition
    view: View
    tokenizer: PreTrainedTokenizerBase

    @property
    def kept(self) -> Network | None:
        """Weights that a checkpoint must hold: none."""
        return None

    def fit(self, scored: list[Scored]) -> list[Scored]:
        """Rollouts that the view can hold, cut where they must be; equal on all ranks as `scored` is.

        Raises:
            DataError: none is left, or a revision has no verdict at all.
        """
        if self.view.same and self.view.max_tokens is None:
            return scored
        return self.view.fit_all(self.tokenizer, scored, self.network.spec.max_positions)

    def signal(self, batch: Batch) -> tuple[TeacherSignal, ...]:
        """Hidden states of the response tokens: one forward pass, no logits yet."""
        hidden = self._hidden(batch.micro) if self.view.same else self._hidden_in_view(batch)
        if self.head is None:
            return ()
        return tuple(Full(hidden_RH=rows, head_vH=self.head, partition=self.partition) for rows in hidden)

    def after_step(self, student: Student, step: int) -> None:
        """Nothing."""

    def restored(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def _hidden(self, micro: Sequence[MicroBatch]) -> tuple[Tensor, ...]:
        return self.network.read_responses(micro, lambda hidden_RH, rows, index: hidden_RH)

    def _hidden_in_view(self, batch: Batch) -> tuple[Tensor, ...]:
        """The view has other lengths, so it is packed anew; sequences find their rows again by group and sample."""
        sizes, device = self.network.runtime.mesh.sizes, batch.micro[0].input_T.device
        rollouts = [one for micro in batch.micro for one in micro.sequences]
        read: tuple[MicroBatch, ...] = ()
        if rollouts:
            read = pack(
                [self.view.reading(self.tokenizer, one) for one in rollouts],
                dp_rank=0,
                dp_size=1,
                tokens_per_micro_batch=max(micro.input_T.numel() for micro in batch.micro),
                sequence_multiple=sizes.sequence_multiple,
                total_multiple=sizes.total_multiple,
                device=device,
                version=batch.version,
            ).micro
        found: dict[tuple[str, int], Tensor] = {}
        for micro, hidden_RH in zip(read, self._hidden(read) if read else (), strict=False):
            lengths = [len(one.rollout.tokens) for one in micro.sequences]
            for one, rows_RH in zip(micro.sequences, hidden_RH.split(lengths), strict=True):
                found[_key(one)] = rows_RH
        if self.head is None:
            return ()
        nothing = self.head.new_zeros(0, self.network.spec.hidden_size)
        return tuple(torch.cat([nothing, *(found[_key(one)] for one in micro.sequences)]) for micro in batch.micro)


def _key(one: Scored) -> tuple[str, int]:
    return one.rollout.group, one.rollout.sample
