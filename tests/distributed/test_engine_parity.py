"""The engine that writes rollouts and the trainer that learns from them give a token the same log-probability."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_distill.data.packing import pack
from megatron_distill.models.optimizer import OptimizerSection
from megatron_distill.models.student import Student, StudentSection
from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.sft import SFT
from megatron_distill.rollout.base import Request, Sampling
from megatron_distill.rollout.embedded import EmbeddedEngine
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import start
from megatron_distill.testing.tiny import tiny_model
from megatron_distill.testing.world import Worlds
from megatron_distill.train.step import bind
from megatron_distill.types import Origin, Prompt, Rollout, Scored, TokenStats

VOCAB_SIZE, VALID = 200, 180
PROMPTS = ((5, 6, 7), (9,), (11, 12, 13, 14, 15, 16, 17), (20, 21))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("parity") / "student", "qwen2", vocab_size=VOCAB_SIZE, layers=2)


def difference_before_and_after_a_step(folder: Path, sizes: ParallelSizes, temperature: float) -> list[float]:
    """Largest difference of any response token's log-prob, with fresh weights and after an update was published."""
    with start(sizes, Precision()) as runtime:
        student = Student.build(
            StudentSection(model=folder), OptimizerSection(lr=1e-2), runtime, steps=1, valid_vocab=VALID
        )
        engine = EmbeddedEngine(folder, valid_vocab=VALID, stop_ids=(3,))
        found = []
        for version in range(2):
            engine.load_weights(student, version)
            requests = [
                Request(tokens=prompt, sampling=Sampling(temperature=temperature, max_new_tokens=12), key=(index,))
                for index, prompt in enumerate(PROMPTS)
            ]
            done = engine.generate(requests)
            assert all(max(one.tokens) < VALID for one in done)
            scored = [
                Scored(
                    rollout=Rollout(
                        prompt=Prompt(id=str(index), messages=(), tokens=PROMPTS[index]),
                        group=str(index),
                        sample=0,
                        tokens=one.tokens,
                        logprobs=one.logprobs,
                        origin=(Origin.STUDENT,) * len(one.tokens),
                        stop=one.stop,
                        version=one.version,
                    ),
                    reward=None,
                )
                for index, one in enumerate(done)
            ]
            batch = pack(
                scored,
                dp_rank=runtime.mesh.dp_rank,
                dp_size=sizes.dp,
                tokens_per_micro_batch=24,
                sequence_multiple=sizes.sequence_multiple,
                total_multiple=sizes.total_multiple,
                device=torch.device("cpu"),
                version=version,
            )
            trainer = torch.cat(student.score(batch, temperature))
            written = torch.cat([micro.rollout_logp_R for micro in batch.micro])
            found.append(float((trainer - written).abs().max()))
            objective = SFT()
            plan, _ = objective.prepare(TokenStats(), batch, Scope(seed=0, step=0), {})
            student.step(batch, bind(objective, {}, plan, batch, student.partition))
        return found


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize(
    "sizes",
    [ParallelSizes(), ParallelSizes(tp=2, sequence_parallel=True), ParallelSizes(pp=2), ParallelSizes(cp=2)],
    ids=["tp=1", "tp=2 sp", "pp=2", "cp=2"],
)
def test_engine_and_trainer_agree(worlds: Worlds, folder: Path, sizes: ParallelSizes, temperature: float) -> None:
    by_rank = worlds(sizes.world).run(difference_before_and_after_a_step, folder, sizes, temperature, init=False)
    for differences in by_rank:
        print(sizes, temperature, differences)
        assert max(differences) <= 1e-5
