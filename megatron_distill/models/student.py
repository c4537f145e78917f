"""The model that learns: a network, its optimizer and its schedule behind a few verbs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_distill.errors import DistillError
from megatron_distill.losses.chunk import linear_rows
from megatron_distill.losses.vocab import logprob, logprob_and_entropy
from megatron_distill.models.build import Recompute
from megatron_distill.models.hf.io import TensorPlan
from megatron_distill.models.hf.stage import Slice
from megatron_distill.models.network import Network
from megatron_distill.models.optimizer import OptimizerSection, build_optimizer, wrap_in_ddp
from megatron_distill.models.schedule import MicroLoss, forward_backward
from megatron_distill.models.spec import ModelSpec
from megatron_distill.runtime.mesh import Mesh
from megatron_distill.runtime.start import Runtime
from megatron_distill.types import Batch, Metric, StepReport, VocabPartition, VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSection:
    """Section `student`: the model that learns."""

    model: Path
    """Hugging Face folder: config.json, safetensors, tokenizer files."""
    trust_remote_code: bool = False
    """Let the folder's own Python build its tokenizer; the model itself never runs code of the folder."""
    recompute: Recompute = "none"
    """`full` keeps only layer inputs and computes the rest again in the backward pass."""


@dataclass(slots=True, kw_only=True)
class Student:
    """Built on every rank of the mesh; its methods are collective."""

    network: Network
    optimizer: Any
    lr_schedule: Any
    chunk_rows: int

    @staticmethod
    def build(
        section: StudentSection,
        optimizer: OptimizerSection,
        runtime: Runtime,
        *,
        steps: int,
        chunk_rows: int = 1024,
        valid_vocab: int | None = None,
    ) -> Student:
        """Weights from the section's folder, fresh optimizer state.

        Args:
            section: which model.
            optimizer: its optimizer.
            runtime: the world.
            steps: length of the learning-rate schedule.
            chunk_rows: response tokens whose logits exist at one time.
            valid_vocab: ids that all models of the run know; default: the student's own.

        Raises:
            ModelError: the folder is not a model of a known family, or lacks a tensor.
        """
        network = Network.load(section.model, runtime, valid_vocab=valid_vocab, recompute=section.recompute)
        with runtime.backend.megatron():
            network.module = wrap_in_ddp(network.module, runtime)
            built, schedule = build_optimizer(optimizer, network.module, runtime, steps)
        return Student(network=network, optimizer=built, lr_schedule=schedule, chunk_rows=chunk_rows)

    @property
    def spec(self) -> ModelSpec:
        """The architecture."""
        return self.network.spec

    @property
    def mesh(self) -> Mesh:
        """The ranks that share it."""
        return self.network.runtime.mesh

    @property
    def partition(self) -> VocabPartition:
        """This rank's vocabulary columns."""
        return self.network.partition

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors by Hugging Face name, on every rank and in one order."""
        return self.network.weights()

    def stage_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Those that this pipeline stage owns, on the first of its tp ranks; collective over all of those."""
        return self.network.stage_weights()

    def stage_slices(self) -> Iterator[Slice]:
        """What this rank holds of each tensor of `stage_weights`, in its order; not collective."""
        return self.network.stage_slices()

    def stage_plan(self) -> list[TensorPlan]:
        """Names, shapes and types of what `stage_weights` will give, in its order; not collective."""
        return self.network.stage_plan()

    def score(self, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, ...]:
        """Log-probs of the response tokens: one [R] per micro-batch, on every model-parallel rank."""
        return tuple(found_R1[:, 0] for found_R1 in score(self.network, batch, temperature, self.chunk_rows))

    def score_with_entropy(
        self, batch: Batch, temperature: float = 1.0
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """`score`, and the entropy in nats of the distribution that each token was drawn from, in one pass."""
        found = score(self.network, batch, temperature, self.chunk_rows, entropy=True)
        return tuple(both_R2[:, 0] for both_R2 in found), tuple(both_R2[:, 1] for both_R2 in found)

    def step(self, batch: Batch, loss: MicroLoss, *, skip_nonfinite: bool = False) -> StepReport:
        """Forward, backward, update.

        Raises:
            DistillError: loss or gradient norm is not finite and `skip_nonfinite` is off; weights are untouched.
        """
        self.network.module.train()
        with self.network.runtime.backend.megatron():
            self.network.module.zero_grad_buffer()
            self.optimizer.zero_grad()
        sums = forward_backward(self.network, batch, loss, self.chunk_rows)
        total = sum(sums[name] for name in loss.names)
        self.lr_schedule.step(increment=1)
        with self.network.runtime.backend.megatron():
            # Megatron's own step has no place to stop between the norm and the update
            self.optimizer.prepare_grads()
            norm = float(self.optimizer.get_grad_norm())
            finite = math.isfinite(norm) and math.isfinite(total)
            if not finite and not skip_nonfinite:
                raise DistillError(
                    f"loss {total}, gradient norm {norm}: not finite, weights are left as they were; look at the last "
                    "samples and at optimizer.lr, or set train.on_nonfinite=skip"
                )
            if finite:
                self.optimizer.step()
        lr = self.optimizer.param_groups[0]["lr"]
        metrics = tuple(Metric(name, value) for name, value in sums.items())
        return StepReport(metrics=metrics, loss=total, grad_norm=norm, lr=lr, skipped=not finite)


def score(
    network: Network, batch: Batch, temperature: float, chunk_rows: int, *, entropy: bool = False
) -> tuple[Tensor, ...]:
    """Log-probs of the response tokens under any network, and the entropy beside them if it is wanted.

    One [R, 1] or [R, 2] per micro-batch, on every model-parallel rank.
    """
    mesh, device = network.runtime.mesh, network.runtime.backend.device

    def scores(hidden_RH: Tensor, mine: slice, index: int) -> Tensor:
        target_R = batch.micro[index].target_R[mine].to(device)

        def chunk(logits_Cv: Tensor, rows: slice) -> Tensor:
            shard = VocabShard.of(logits_Cv, network.partition, temperature)
            if entropy:
                return torch.stack(logprob_and_entropy(shard, target_R[rows]), dim=-1)
            return logprob(shard, target_R[rows])[:, None]

        return linear_rows(hidden_RH, network.head(), chunk, chunk_rows)

    found = network.read_responses(batch.micro, scores) or tuple(
        torch.zeros(micro.rows, 2 if entropy else 1, device=device) for micro in batch.micro
    )
    return tuple(mesh.from_last_stage(values) for values in found)
