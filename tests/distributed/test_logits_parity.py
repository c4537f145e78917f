"""Our Megatron models compute what transformers computes, at every cut, and give back the same bits they were given.

Norm weights and biases of the models are random, two sequences are packed together, and positions run past where
Llama-3's rope scaling sets in, so a wrong name, row, position or mask shows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_distill.data.packing import pack
from megatron_distill.models.hf.io import SafetensorsFolder
from megatron_distill.models.network import Network
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import Runtime, start
from megatron_distill.testing.tiny import tiny_model
from megatron_distill.testing.world import Worlds
from megatron_distill.types import MicroBatch, Origin, Prompt, Rollout, Scored, Stop

LARGEST_DIFFERENCE = 1e-4
"""Of any logit in fp32; logits here reach about 3."""

VOCAB_SIZE = 259
LENGTHS = (97, 31, 64)
"""Tokens of each sequence; all but the first are response."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Every family, tied and untied, with grouped queries; head sizes that are and are not hidden / heads."""
    root = tmp_path_factory.mktemp("models")
    made = []
    for tied in (False, True):
        made += [
            tiny_model(root / f"qwen2_{tied}", "qwen2", tied=tied),
            tiny_model(root / f"qwen3_{tied}", "qwen3", tied=tied, heads=8, head_dim=24),
            tiny_model(
                root / f"llama_{tied}", "llama", tied=tied, heads=8, kv_heads=4, head_dim=16, rope_parameters=LLAMA3
            ),
        ]
    return made


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]


def packed(total_multiple: int = 1) -> tuple[MicroBatch, ...]:
    """All sequences, in two micro-batches."""
    scored = [
        Scored(
            rollout=Rollout(
                prompt=Prompt(id=str(sample), messages=(), tokens=tuple(tokens[:1])),
                group="0",
                sample=sample,
                tokens=tuple(tokens[1:]),
                logprobs=None,
                origin=(Origin.STUDENT,) * (len(tokens) - 1),
                stop=Stop.LENGTH,
                version=0,
            ),
            reward=None,
        )
        for sample, tokens in enumerate(sequences())
    ]
    return pack(
        scored,
        dp_rank=0,
        dp_size=1,
        tokens_per_micro_batch=130,
        total_multiple=total_multiple,
        device=torch.device("cpu"),
        version=0,
    ).micro


def ours(folders: list[Path], sizes: ParallelSizes) -> list[tuple[list[NDArray[np.float32]], bool]]:
    """For each model this rank's logits [R, v] of each micro-batch (last stage only), and whether all its weights came
    back unchanged."""
    with start(sizes, Precision()) as runtime:
        return [logits_and_exactness(folder, runtime) for folder in folders]


def logits_and_exactness(folder: Path, runtime: Runtime) -> tuple[list[NDArray[np.float32]], bool]:
    network = Network.load(folder, runtime)
    reader = SafetensorsFolder(folder)
    returned = {name: torch.equal(tensor, reader.read(name)) for name, tensor in network.weights()}
    exact = returned.keys() == reader.names and all(returned.values())
    batch = packed(runtime.mesh.sizes.total_multiple)
    logits = network.read(batch, lambda hidden_RH, _: hidden_RH @ network.head().detach().t())
    # as arrays: Megatron makes a pickled tensor one that only a process with Megatron can read
    return [logits_Rv.numpy() for logits_Rv in logits], exact


@torch.no_grad()
def theirs(folder: Path) -> list[Tensor]:
    """Logits [R, V] of each micro-batch by transformers, one unpadded sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    rows = []
    for micro in packed():
        tokens = [(*scored.rollout.prompt.tokens, *scored.rollout.tokens) for scored in micro.sequences]
        rows.append(torch.cat([model(torch.tensor([one])).logits[0, :-1] for one in tokens]))
    return rows


@pytest.mark.parametrize(
    "sizes",
    [
        ParallelSizes(),
        ParallelSizes(tp=2),
        ParallelSizes(tp=2, sequence_parallel=True),
        ParallelSizes(pp=2),
        ParallelSizes(tp=2, pp=2),
    ],
    ids=["tp1_pp1", "tp2_pp1", "tp2_pp1_sp", "tp1_pp2", "tp2_pp2"],
)
def test_logits_are_those_of_transformers(worlds: Worlds, folders: list[Path], sizes: ParallelSizes) -> None:
    by_rank = worlds(sizes.world).run(ours, folders, sizes, init=False)
    for number, folder in enumerate(folders):
        assert all(ranks[number][1] for ranks in by_rank), f"{folder.name}: weights came back changed"
        # ranks count through tensor parallel first: the last stage's are the last tp
        shards = [ranks[number][0] for ranks in by_rank[-sizes.tp :]]
        for expected, *parts in zip(theirs(folder), *shards, strict=True):
            actual = torch.from_numpy(np.concatenate(parts, axis=-1)[:, :VOCAB_SIZE])
            difference = (actual - expected).abs().max().item()
            print(f"{folder.name} {sizes}: {difference:.2e}")
            assert difference <= LARGEST_DIFFERENCE, f"{folder.name}: logits differ by {difference:.2e}"
            assert expected.abs().max() > 1, f"{folder.name}: logits too small to tell anything"
