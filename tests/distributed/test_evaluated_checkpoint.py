"""A checkpoint is evaluated as it was trained: with the vocabulary that all models of its run share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_distill.config import load
from megatron_distill.models.checkpoint import folder_of
from megatron_distill.testing.tiny import BYTE_VOCAB_SIZE, tiny_model, tiny_tokenizer
from megatron_distill.testing.world import Worlds
from megatron_distill.train.evaluation import evaluate_model
from megatron_distill.train.loop import train


def _training(config: Path) -> None:
    train(load(config))


def _evaluation(config: Path, checkpoint: Path, responses: Path) -> None:
    evaluate_model(load(config), checkpoint, responses)


def test_ids_that_a_teacher_lacks_are_not_drawn(worlds: Worlds, tmp_path: Path) -> None:
    student = tiny_tokenizer(tiny_model(tmp_path / "student", "qwen3", hidden=32, vocab_size=BYTE_VOCAB_SIZE + 2))
    tiny_tokenizer(tiny_model(tmp_path / "teacher", "qwen3", hidden=32))
    # whatever the last hidden state: one of the two rows without a token is by far the likeliest
    weights = load_file(student / "model.safetensors")
    weights["lm_head.weight"][-2:] = 100 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    weights["lm_head.weight"][-1] *= -1
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "data.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    config = tmp_path / "run.yaml"
    config.write_text(f"""
base: [base, objectives/opd]
student: {{model: {student}}}
teachers: {{big: {{kind: frozen, model: {tmp_path / "teacher"}}}}}
reward: {{kind: exact}}
rollout: {{sampling: {{max_new_tokens: 4}}}}
metrics: {{console: false, tensorboard: false}}
data: {{prompts: {tmp_path / "data.jsonl"}}}
eval: {{data: {{prompts: {tmp_path / "data.jsonl"}}}, sampling: {{temperature: 0, max_new_tokens: 4}}}}
train: {{steps: 1, prompts_per_step: 1}}
paths: {{run: {tmp_path / "run"}}}
""")
    world = worlds(1)
    world.run(_training, config, init=False)
    world.run(_evaluation, config, folder_of(tmp_path / "run", 1), tmp_path / "answers", init=False)
    answer = json.loads((tmp_path / "answers" / "step_000000.jsonl").read_text())
    assert answer["text"]
