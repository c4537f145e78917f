"""A fixed row of tokens whose log-probs trainer and servers must agree on: proof that the weights arrived."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_distill.data.packing import pack
from megatron_distill.errors import SyncError
from megatron_distill.models.build import vocab_partition
from megatron_distill.models.student import Student, score
from megatron_distill.rollout.base import Given
from megatron_distill.rollout.sglang import Client
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop

LENGTH = 32
"""Tokens; few enough for any server's context, enough to pass through every layer's attention."""
_STRIDE = 7919
"""A prime: ids from all over the vocabulary, the same ones in every run."""
TOLERANCE = {"fp32": 1e-3, "bf16": 0.25}
"""Largest difference of a token's log-prob, by the trainer's type. In fp32 1e-6 is what was seen; the one for bf16 is a
guess with room to spare, to be replaced by what GPUs show."""


@dataclass(frozen=True, slots=True)
class Canary:
    """The fixed tokens of a model."""

    tokens: tuple[int, ...]

    @staticmethod
    def of(vocab_size: int, positions: int) -> Canary:
        """For a model of so many ids and positions."""
        return Canary(tuple(1 + index * _STRIDE % (vocab_size - 1) for index in range(min(LENGTH, positions // 2))))

    def from_trainer(self, student: Student) -> np.ndarray:
        """Log-probs [R] of all tokens but the first, over the model's whole vocabulary; collective."""
        network, mesh = student.network, student.mesh
        # servers know of no ids that this run leaves out
        network = replace(network, partition=vocab_partition(network.spec, mesh))
        batch = pack(
            [_as_rollout(self.tokens)],
            dp_rank=0,  # every replica scores the same tokens
            dp_size=1,
            tokens_per_micro_batch=len(self.tokens),
            sequence_multiple=mesh.sizes.sequence_multiple,
            total_multiple=mesh.sizes.total_multiple,
            device=network.runtime.backend.device,
            version=0,
        )
        (logp_R1,) = score(network, batch, 1.0, student.chunk_rows)
        return logp_R1[:, 0].float().cpu().numpy()

    async def from_server(self, client: Client) -> np.ndarray:
        """The same from a server."""
        scores = await client.score(Given(tokens=self.tokens, start=1), rid="weights-canary")
        return scores.logprobs


def compare(url: str, trainer_R: np.ndarray, server_R: np.ndarray, tolerance: float, what: str) -> float:
    """The largest difference.

    Raises:
        SyncError: it is above `tolerance`, or no number.
    """
    worst = float(np.abs(trainer_R - server_R).max())
    if not worst <= tolerance:
        raise SyncError(
            f"{what}: {url} gives the fixed tokens log-probs that differ by up to {worst:.3g} from the trainer's, "
            f"allowed is {tolerance:g}. Either the server does not hold the weights that were sent, or it computes "
            "otherwise: compare the model folder, dtype and quantisation that it was started with, or raise "
            "canary_tolerance if the difference is one of precision"
        )
    return worst


def _as_rollout(tokens: tuple[int, ...]) -> Scored:
    prompt = Prompt(id="canary", messages=(), tokens=tokens[:1])
    return Scored(
        rollout=Rollout(
            prompt=prompt,
            group="canary",
            sample=0,
            tokens=tokens[1:],
            logprobs=None,
            origin=(Origin.CONSTRUCTED,) * (len(tokens) - 1),
            stop=Stop.LENGTH,
            version=0,
        ),
        reward=None,
    )


def default_tolerance(dtype: torch.dtype) -> float:
    """For a trainer that computes in `dtype`."""
    return TOLERANCE["fp32" if dtype == torch.float32 else "bf16"]
