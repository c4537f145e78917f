"""A Megatron model as the rest of the project sees it: packed tokens in, hidden states on the response axis out.

Here end padding, packing, and every cut of the sequence: whatever the sizes of the mesh, the last pipeline stage gets
[R, H]. Under context parallelism each rank gets its own share of the rows of R, `my_rows`. Logits are made further
up, chunk by chunk, from these hidden states and `head`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_distill.models.build import Recompute, build_model, vocab_partition
from megatron_distill.models.hf.io import SafetensorsFolder, TensorPlan
from megatron_distill.models.hf.mapping import export
from megatron_distill.models.hf.stage import (
    Slice,
    gather_first,
    gather_over,
    load_stage,
    parameters_of,
    plan_stage,
    stage_slices,
    uses_te_names,
)
from megatron_distill.models.spec import ModelSpec
from megatron_distill.runtime.mesh import zigzag_order, zigzag_rows
from megatron_distill.runtime.start import Runtime
from megatron_distill.types import MicroBatch, VocabPartition


@dataclass(slots=True, kw_only=True)
class Network:
    """This rank's stage of a model, with the weights of a Hugging Face folder."""

    spec: ModelSpec
    runtime: Runtime
    module: Any
    """Megatron's GPTModel, or its DistributedDataParallel wrapper."""
    partition: VocabPartition

    @staticmethod
    def load(
        folder: Path, runtime: Runtime, *, valid_vocab: int | None = None, recompute: Recompute = "none"
    ) -> Network:
        """Build and fill from a model folder; `valid_vocab` cuts the vocabulary to what all models of a run share.

        Raises:
            ModelError: the folder is not a model of a known family, or lacks a tensor.
        """
        spec = ModelSpec.from_folder(folder)
        network = Network.empty(spec, runtime, valid_vocab=valid_vocab, recompute=recompute)
        sizes = runtime.mesh.sizes
        load_stage(
            network.parameters(), spec, SafetensorsFolder(folder), tp_rank=runtime.mesh.tp_rank, tp_size=sizes.tp
        )
        return network

    @staticmethod
    def empty(
        spec: ModelSpec, runtime: Runtime, *, valid_vocab: int | None = None, recompute: Recompute = "none"
    ) -> Network:
        """Allocated, with no meaningful weights yet."""
        module = build_model(spec, runtime, recompute)
        partition = vocab_partition(spec, runtime.mesh, valid_vocab)
        return Network(spec=spec, runtime=runtime, module=module, partition=partition)

    @property
    def model(self) -> Any:
        """The GPTModel itself."""
        return self.module.module if hasattr(self.module, "ddp_config") else self.module

    def parameters(self) -> dict[str, Tensor]:
        """This rank's parameters by Megatron name, layers numbered through the whole model."""
        return parameters_of([self.module])

    def head(self) -> Tensor:
        """This rank's shard [v, H] of the output weight; last stage only."""
        if self.spec.tied_embeddings:
            return self.model.shared_embedding_or_output_weight()
        return self.model.output_layer.weight

    def hidden(self, micro: MicroBatch) -> Tensor:
        """One forward pass: [my rows of R, H] on the last pipeline stage, what the next stage reads elsewhere.

        The gradient that comes back on the last stage may be this tensor-parallel rank's part only: it is summed here.
        """
        mesh, backend = self.runtime.mesh, self.runtime.backend
        mine = zigzag_rows(micro.cu_seqlens, mesh.sizes.cp, mesh.cp_rank)
        position_T = micro.position_T[mine]
        layout = backend.layout(self.model, micro.cu_seqlens, position_T, mesh.sizes.cp, mesh.cp_rank)
        return self.module(
            input_ids=micro.input_T[mine][None].to(backend.device),
            position_ids=position_T[None].to(backend.device),
            attention_mask=None,
            packed_seq_params=layout,
            output_processor=self._response_rows if mesh.is_last_stage else None,
            output_processor_context=micro,
        )

    def _response_rows(self, *, hidden_states: Tensor, context: MicroBatch, **_: object) -> Tensor:
        from megatron.core.tensor_parallel.mappings import (
            copy_to_tensor_model_parallel_region,
            gather_from_sequence_parallel_region,
        )

        groups, sizes = self.runtime.mesh.groups, self.runtime.mesh.sizes
        if sizes.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=groups.tp)
        rows = context.response_R[self.my_rows(context.rows)]
        if sizes.cp > 1:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=groups.cp)
            rows = zigzag_order(context.cu_seqlens, sizes.cp).to(rows.device)[rows]
        hidden_RH = hidden_states.squeeze(1)[rows.to(hidden_states.device)]
        if not sizes.sequence_parallel:
            hidden_RH = copy_to_tensor_model_parallel_region(hidden_RH, group=groups.tp)
        return hidden_RH

    def my_rows(self, rows: int) -> slice:
        """Which of R's `rows` this context-parallel rank judges: an even share, in order."""
        cp, rank = self.runtime.mesh.sizes.cp, self.runtime.mesh.cp_rank
        return slice(rows * rank // cp, rows * (rank + 1) // cp)

    def all_rows(self, mine: Tensor, rows: int) -> Tensor:
        """What context-parallel ranks found for their own of `rows` rows, put together on all of them: [rows, ...]."""
        if self.runtime.mesh.sizes.cp == 1:
            return mine
        # every rank fills its own rows and leaves zeros elsewhere: the sum is the whole
        whole = mine.new_zeros(rows, *mine.shape[1:])
        whole[self.my_rows(rows)] = mine
        torch.distributed.all_reduce(whole, group=self.runtime.mesh.groups.cp)
        return whole

    @torch.no_grad()
    def read(self, batch: Sequence[MicroBatch], rows: Callable[[Tensor, int], Any]) -> list[Any]:
        """Forward only, through the pipeline: what `rows(hidden_RH, micro index)` made of each micro-batch.

        Empty on stages that see no hidden states of the last layer.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward(micro: Iterator[tuple[int, MicroBatch]], _: Any) -> tuple[Tensor, Callable[..., Any]]:
            index, batch = next(micro)
            return self.hidden(batch), lambda hidden_RH, non_loss_data: rows(hidden_RH, index)

        was_training = self.module.training
        self.module.eval()
        with self.runtime.backend.megatron():
            found = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(enumerate(batch)),
                model=[self.module],
                num_microbatches=len(batch),
                seq_length=1,
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        self.module.train(was_training)
        return found

    def read_responses(
        self, batch: Sequence[MicroBatch], rows: Callable[[Tensor, slice, int], Tensor]
    ) -> tuple[Tensor, ...]:
        """`read`, for one value (or vector) per response token: [R, ...] for each micro-batch, last stage only.

        `rows(hidden_RH, rows of R, micro index)` sees this context-parallel rank's share; the shares are put together.
        """

        def share(hidden_RH: Tensor, index: int) -> Tensor:
            mine = self.my_rows(batch[index].rows)
            return self.all_rows(rows(hidden_RH, mine, index), batch[index].rows)

        return tuple(self.read(batch, share))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors by Hugging Face name, on every rank and in one order; collective.

        The stream that export, weight sync and conversion all read.
        """
        mesh, parameters = self.runtime.mesh, self.parameters()
        pp_group = mesh.groups.pp if mesh.sizes.pp > 1 else None
        shards = gather_over(parameters, tp_group=mesh.tp_group, pp_group=pp_group)
        yield from export(self.spec, shards, uses_te_names(parameters))

    def stage_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors that this pipeline stage owns, by Hugging Face name, on the first of its tp ranks alone.

        Collective over those: the others must run through the stream too, which is empty for them. The stages'
        streams put together are `weights`; a tied output weight is the first stage's embedding, and the last stage's
        copy is left out. One parameter at a time is gathered: keep none to hold none.
        """
        return gather_first(self.stage_slices(), self.runtime.mesh.tp_group)

    def stage_slices(self) -> Iterator[Slice]:
        """What this rank holds of each tensor of `stage_weights`, in its order; not collective."""
        mesh = self.runtime.mesh
        return stage_slices(self.parameters(), self.spec, mesh.tp_rank, mesh.sizes.tp)

    def stage_plan(self) -> list[TensorPlan]:
        """Names, shapes and types of what `stage_weights` will give, in its order; not collective."""
        return plan_stage(self.parameters(), self.spec)
