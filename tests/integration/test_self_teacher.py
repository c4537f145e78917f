"""A run whose teacher is the student itself: trained over two ranks, interrupted, and gone on with, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_distill.config import check, load
from megatron_distill.config.run import RunConfig
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.testing.world import Worlds
from megatron_distill.train.loop import train
from megatron_distill.train.metrics import UNREPEATABLE

TEACHERS = {
    "ema, shown the solution": "{kind: itself, weights: ema, decay: 0.5, view: {privileged: {}}}",
    "refreshed, its verdict": "{kind: itself, weights: refreshed, every: 2, view: {revision: {}, max_tokens: 100}}",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("itself")
    tiny_tokenizer(tiny_model(root / "student", "qwen3", hidden=32, kv_heads=4))
    rows = [{"question": f"{n} + {n}?", "answer": str(2 * n), "worked": f"twice {n} is {2 * n}"} for n in range(8)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run_of(root: Path, teacher: str, folder: str, steps: int) -> RunConfig:
    (root / "run.yaml").write_text(f"""
base: [base]
student: {{model: {root / "student"}}}
objective: {{kind: gkd}}
teachers: {{me: {teacher}}}
rollout: {{kind: generate, sampling: {{max_new_tokens: 12}}}}
reward: {{kind: exact}}
data: {{prompts: {root / "data.jsonl"}, solution_key: worked}}
optimizer: {{lr: 1.0e-2}}
train: {{prompts_per_step: 4, tokens_per_micro_batch: 90}}
checkpoint: {{every: 3}}
parallel: {{tp: 2}}
metrics: {{tensorboard: false, console: false}}
paths: {{run: {root / folder}}}
""")
    run = load(root / "run.yaml", [f"train.steps={steps}"])
    check(run)
    return run


def lines_of(run: RunConfig) -> list[dict[str, Any]]:
    """What a step gives again if it is done again."""
    lines = [json.loads(line) for line in (run.paths.run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(UNREPEATABLE)} for line in lines]


@pytest.mark.parametrize("name", TEACHERS)
def test_an_interrupted_run_goes_on_with_the_teacher_it_had(worlds: Worlds, root: Path, name: str) -> None:
    """The checkpoint lies between two refreshes, and the average is of all steps: neither follows from the student."""
    folder = name.split(",")[0]
    straight, cut = (run_of(root, TEACHERS[name], f"{folder} {kind}", 5) for kind in ("straight", "cut"))
    worlds(2).run(train, straight, init=False)
    first = run_of(root, TEACHERS[name], f"{folder} cut", 3)
    worlds(2).run(train, first, init=False)
    worlds(2).run(train, cut, init=False)
    expected, found = lines_of(straight), lines_of(cut)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    assert found == expected
    assert all(line["loss/total"] > 0 for line in found)
    assert any(line["rollout/cut_for_teachers"] > 0 for line in found) == ("max_tokens" in TEACHERS[name])
