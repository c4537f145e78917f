"""A run whose models and data exist, for the sections to disagree about."""

from __future__ import annotations

import json

import pytest

from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders by name: a student with 4 heads, 2 key-value heads and 2 layers, a larger teacher of another family."""
    root = tmp_path_factory.mktemp("models")
    tiny_model(root / "student", "qwen2", hidden=32)
    tiny_model(root / "teacher", "llama", hidden=64, layers=4, heads=8, kv_heads=4)
    for name in ("student", "teacher"):
        tiny_tokenizer(root / name)
    return root


@pytest.fixture
def run_file(models, tmp_path, monkeypatch):
    """The path of a config that passes every check; the working directory is empty but for its data."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(f"""
base: [base, objectives/opd]
student: {{model: {models / "student"}}}
teachers: {{big: {{kind: frozen, model: {models / "teacher"}}}}}
reward: {{kind: exact}}
data: {{prompts: data.jsonl}}
train: {{steps: 2, prompts_per_step: 2}}
paths: {{run: runs/here}}
""")
    return tmp_path / "run.yaml"
