"""The output weight's gradient goes straight into Megatron's buffer, and is what autograd would have brought there.

The reference is the same schedule on one rank over a bare model, without DistributedDataParallel: there every
gradient, of a tied weight both parts of it, comes through autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_distill.data.packing import pack
from megatron_distill.losses.vocab import logprob
from megatron_distill.models.hf.mapping import export
from megatron_distill.models.hf.stage import gather_over, uses_te_names
from megatron_distill.models.network import Network
from megatron_distill.models.optimizer import wrap_in_ddp
from megatron_distill.models.schedule import forward_backward, gradient_buffer
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import start
from megatron_distill.testing.assertions import TOLERANCE
from megatron_distill.testing.tiny import tiny_model
from megatron_distill.testing.world import Worlds
from megatron_distill.types import Batch, Origin, Prompt, Rollout, Scored, Stop, VocabPartition, VocabShard

VOCAB_SIZE = 200
LENGTHS = ((5, 9), (3, 21), (11, 2), (4, 13))

CUTS = {
    "one rank": ParallelSizes(),
    "tp=2": ParallelSizes(tp=2),
    "tp=2 sp": ParallelSizes(tp=2, sequence_parallel=True),
    "pp=2": ParallelSizes(pp=2),
    "tp=2 pp=2": ParallelSizes(tp=2, pp=2),
}


@dataclass(frozen=True)
class _Likelihood:
    """Weighted log-probs of the responses: a loss of logits and nothing else."""

    batch: Batch
    partition: VocabPartition
    names: tuple[str, ...] = ("loss",)
    figures: tuple[str, ...] = ()

    def __call__(self, logits_Cv: Tensor, micro: int, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        shard = VocabShard.of(logits_Cv, self.partition, 1.3, disposable=True)
        weight_R = 1.0 + torch.arange(rows.start, rows.stop) % 3
        value = -(logprob(shard, self.batch.micro[micro].target_R[rows]) * weight_R).sum() / 45.0
        return value, {"loss": value.detach()}


class _Made(TorchDispatchMode):
    """How many storages as large as the output weight's gradient come from operations within."""

    def __init__(self, bytes_each: int) -> None:
        super().__init__()
        self.bytes_each = bytes_each
        self.kept: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._address(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            large = isinstance(one, Tensor) and one.untyped_storage().nbytes() >= self.bytes_each
            if large and self._address(one) not in given:
                self.kept[self._address(one)] = one.untyped_storage()
        return found

    @staticmethod
    def _address(one: Tensor) -> int:
        return one.untyped_storage().data_ptr()


def _batch(sizes: ParallelSizes) -> Batch:
    generator = torch.Generator().manual_seed(3)
    made = []
    for sample, (prompt, response) in enumerate(LENGTHS):
        tokens = torch.randint(VOCAB_SIZE, (prompt + response,), generator=generator).tolist()
        rollout = Rollout(
            prompt=Prompt(id=str(sample), messages=(), tokens=tuple(tokens[:prompt])),
            group=str(sample),
            sample=0,
            tokens=tuple(tokens[prompt:]),
            logprobs=(-1.5,) * response,
            origin=(Origin.STUDENT,) * response,
            stop=Stop.EOS,
            version=0,
        )
        made.append(Scored(rollout=rollout, reward=None))
    return pack(
        made,
        dp_rank=0,
        dp_size=1,
        tokens_per_micro_batch=1,
        sequence_multiple=sizes.sequence_multiple,
        total_multiple=sizes.total_multiple,
        device=torch.device("cpu"),
        version=0,
    )


def _gradients(folder: Path, sizes: ParallelSizes, with_buffer: bool) -> tuple[dict[str, np.ndarray], int]:
    """Whole gradients by Hugging Face name, and how many tensors of the output weight's size were made."""
    with start(sizes, Precision()) as runtime:
        network = Network.load(folder, runtime)
        if with_buffer:
            with runtime.backend.megatron():
                network.module = wrap_in_ddp(network.module, runtime)
                network.module.zero_grad_buffer()
        batch = _batch(sizes)
        last = runtime.mesh.is_last_stage
        assert not last or (gradient_buffer(network) is not None) == with_buffer
        parameters = network.parameters()
        width = network.partition.width
        with _Made(width * network.spec.hidden_size * 4) as made:
            forward_backward(network, batch, _Likelihood(batch, network.partition), chunk_rows=8)
        found = {
            # a bare model keeps the sum, which is to be divided by what DistributedDataParallel divides by
            name: (one.main_grad if with_buffer else one.grad / len(batch.micro)).detach()
            for name, one in parameters.items()
        }
        mesh = runtime.mesh
        pp_group = mesh.groups.pp if sizes.pp > 1 else None
        shards = gather_over(found, tp_group=mesh.tp_group, pp_group=pp_group)
        whole = {name: one.numpy().copy() for name, one in export(network.spec, shards, uses_te_names(parameters))}
        return whole, len(made.kept)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # hidden states, logits and everything else stay smaller than the output weight
    return tiny_model(
        tmp_path_factory.mktemp("head") / "model",
        "qwen3",
        tied=request.param,
        vocab_size=VOCAB_SIZE,
        hidden=32,
        heads=4,
        kv_heads=4,
    )


@pytest.fixture(scope="module")
def expected(worlds: Worlds, folder: Path) -> dict[str, np.ndarray]:
    return worlds(1).run(_gradients, folder, ParallelSizes(), False, init=False)[0][0]


@pytest.mark.parametrize("name", CUTS)
def test_the_buffer_gets_what_autograd_would_bring(
    worlds: Worlds, folder: Path, expected: dict[str, np.ndarray], name: str
) -> None:
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for found, _ in worlds(CUTS[name].world).run(_gradients, folder, CUTS[name], True, init=False):
        assert found.keys() == expected.keys()
        for tensor, gradient in expected.items():
            error = np.abs(found[tensor] - gradient).max() / largest
            assert error <= TOLERANCE[torch.float32], f"{tensor} is off by {error:.1e}"
            assert np.abs(gradient).max() > 0, tensor


def test_no_second_tensor_of_the_weights_size_is_made(worlds: Worlds, folder: Path) -> None:
    """On a last stage, which has no embedding of its own to learn; without the buffer each micro-batch makes some."""
    _, made = worlds(2).run(_gradients, folder, CUTS["pp=2"], True, init=False)[1]
    assert made == 0
    _, made_by_autograd = worlds(1).run(_gradients, folder, ParallelSizes(), False, init=False)[0]
    assert made_by_autograd > 0
