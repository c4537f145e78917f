"""Rollouts ahead of training by real servers, two ranks at tp=2: weights change between batches, or in the middle."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_distill.config import load
from megatron_distill.data.traces import read_traces
from megatron_distill.rollout.servers import ServerGroup
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.testing.world import Worlds
from megatron_distill.train.loop import train
from megatron_distill.types import Rollout

STEPS, PROMPTS = 5, 6


@pytest.fixture(scope="module")
def config(tiny_served: Path, served: ServerGroup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    tiny_tokenizer(tiny_model(folder / "teacher", "qwen3", seed=5))
    rows = ({"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(20))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "run.yaml"
    path.write_text(f"""
student: {{model: {tiny_served}}}
teachers: {{main: {{kind: frozen, model: {folder / "teacher"}}}}}
rollout:
  kind: generate
  samples_per_prompt: 2
  record: true
  engine: {{kind: sglang, urls: {served.urls}, in_flight: 8}}
reward: {{kind: exact}}
data: {{prompts: {folder / "prompts.jsonl"}}}
objective: {{kind: opd, divergence: reverse_kl}}
optimizer: {{lr: 3e-3}}
train: {{steps: {STEPS}, prompts_per_step: {PROMPTS}, importance: {{weights: truncated}}}}
checkpoint: {{every: 0}}
parallel: {{tp: 2}}
metrics: {{tensorboard: false, console: false}}
""")
    return path


def ran(worlds: Worlds, config: Path, name: str, *overrides: str) -> tuple[list[dict[str, float]], list[list[Rollout]]]:
    """Its metrics and its rollouts, by step."""
    folder = config.parent / name
    worlds(2).run(train_here, config, [f"paths.run={folder}", *overrides], init=False, timeout=400)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    traces = read_traces(folder / "traces")
    return lines, [[one.rollout for one in traces[step]] for step in range(STEPS)]


def train_here(config: Path, overrides: list[str]) -> None:
    os.chdir(config.parent)
    train(load(config, overrides))


def check_prompts(steps: list[list[Rollout]]) -> None:
    groups = [group for step in steps for group in dict.fromkeys(one.group for one in step)]
    assert groups == [f"{place:012d}" for place in range(STEPS * PROMPTS)]
    assert all(len(step) == 2 * PROMPTS for step in steps)


def test_weights_change_between_batches(worlds: Worlds, config: Path) -> None:
    lines, steps = ran(worlds, config, "wait", "rollout.prefetch.depth=1", "rollout.sampling.max_new_tokens=32")
    check_prompts(steps)
    versions = [{version for one in step for version in one.versions} for step in steps]
    assert versions == [{max(step - 1, 0)} for step in range(STEPS)]
    assert [line["rollout/staleness_max"] for line in lines] == [0, 1, 1, 1, 1]
    assert lines[0]["mismatch/logp_abs_mean"] < 1e-5
    assert lines[0]["mismatch/outside"] == 0
    assert all(line["mismatch/logp_abs_mean"] > 1e-4 for line in lines[1:])
    assert lines[0]["importance/weight_mean"] == pytest.approx(1, abs=1e-4)


def test_responses_are_kept_across_updates(worlds: Worlds, config: Path) -> None:
    """They are long, so that updates come while they are being written."""
    lines, steps = ran(
        worlds,
        config,
        "continue",
        "rollout.prefetch={depth: 1, on_update: continue}",
        "rollout.sampling.max_new_tokens=384",
    )
    check_prompts(steps)
    mixed = [one for step in steps for one in step if len(set(one.versions)) > 1]
    assert mixed, "no update came while a response was being written"
    for one in mixed:
        assert all(later >= earlier for earlier, later in pairwise(one.versions))
        assert len(one.versions) == len(one.tokens) == len(one.logprobs or ())
    for step, written in enumerate(steps):
        assert all(step - 1 <= version <= step for one in written for version in one.versions)
    assert all(line["rollout/staleness_max"] <= 1 for line in lines)
    assert any(0 < line["rollout/staleness_mean"] < 1 for line in lines)
    # tokens of a response that was kept across an update are sampled by the weights that their versions say
    for line in lines:
        assert line["mismatch/fresh_logp_abs_mean"] < 1e-5
        if line["rollout/staleness_mean"] > 0:
            assert line["mismatch/logp_abs_mean"] > 1e-4
