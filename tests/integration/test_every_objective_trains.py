"""Every setting in `configs/objectives/` trains: two steps of the real loop, over two ranks, with real parts.

The rest is what its YAML asks for: a teacher if it needs one, by the name that it uses; several responses to a prompt
if it compares them; pairs, solutions and verdicts from the data.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_distill.config import check, load
from megatron_distill.config.read import kind_of
from megatron_distill.data.traces import write_traces
from megatron_distill.plugins import kinds
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.testing.world import Worlds
from megatron_distill.train.loop import train
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop

PROJECT = Path(__file__).parents[2]
CONFIGS = PROJECT / "configs" / "objectives"
SETTINGS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
OBJECTIVES = kinds("megatron_distill.objectives")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("objectives")
    tiny_model(root / "student", "qwen3", hidden=32, kv_heads=4)
    tiny_model(root / "teacher", "llama", hidden=64, seed=1)
    rows = []
    for number in range(16):
        right, wrong = f"{number} + {number} = {2 * number}", f"{number} + {number} = {2 * number + 1}, I think"
        question = f"{number} + {number}?"
        rows.append({"question": question, "answer": str(2 * number), "chosen": right, "rejected": wrong})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("student", "teacher"):
        tiny_tokenizer(root / name)
    for kind in ("generate", "revise", "reflect"):
        record(root / kind, kind)
    return root


def config_of(root: Path, setting: str) -> Path:
    """A run around one objective's YAML."""
    run = root / f"{setting}.yaml"
    run.write_text(f"""
base: [base, objectives/{setting}]
student: {{model: {root / "student"}}}
reward: {{kind: exact}}
data: {{prompts: {root / "data.jsonl"}, solution_key: chosen}}
optimizer: {{lr: 1.0e-3}}
train: {{steps: 2, prompts_per_step: 4, tokens_per_micro_batch: 64}}
parallel: {{dp: 2}}
metrics: {{tensorboard: false, console: false}}
paths: {{run: {root / setting}}}
""")
    return run


def overrides_of(root: Path, setting: str) -> list[str]:
    """What the objective needs and its YAML leaves to the user: teachers, and short responses."""
    run = load(config_of(root, setting))
    needs = run.objective.needs
    overrides = []
    if needs.teacher is not None and not run.teachers:
        names = needs.teacher_names or {"main"}
        overrides += [f"teachers.{name}={{kind: frozen, model: {root / 'teacher'}}}" for name in sorted(names)]
    if run.rollout.needs_reward:
        # random weights are never right, so such a source would go on asking until it gives up
        return [*overrides, f"rollout={{kind: replay, path: {root / kind_of(run.rollout)}}}"]
    if hasattr(run.rollout, "sampling"):
        overrides.append("rollout.sampling.max_new_tokens=6")
    return overrides


def record(folder: Path, kind: str) -> None:
    """Two steps of two prompts, as a source would have written them: answers, revisions, or answers and repairs."""
    generator = torch.Generator().manual_seed(5)

    def one(step: int, prompt: int, sample: int, origin: tuple[Origin, ...], reward: float, group: str = "") -> Scored:
        tokens = tuple(torch.randint(3, 259, (len(origin),), generator=generator).tolist())
        return Scored(
            rollout=Rollout(
                prompt=Prompt(id=str(prompt), messages=(), tokens=(1, 10 + prompt, 2)),
                group=f"{2 * step + prompt:012d}{group}",
                sample=sample,
                tokens=tokens,
                logprobs=tuple(-5.0 if written is Origin.STUDENT else float("nan") for written in origin),
                origin=origin,
                stop=Stop.EOS,
                version=step,
            ),
            reward=reward,
            facts={"prefix_tokens": 2.0} if group else {},
        )

    answer, repair = (Origin.STUDENT,) * 6, (Origin.CONSTRUCTED,) * 7
    revision = (Origin.STUDENT, Origin.STUDENT, Origin.CONSTRUCTED, Origin.STUDENT, Origin.STUDENT)
    for step in range(2):
        scored = []
        for prompt in range(2):
            if kind == "revise":
                scored.append(one(step, prompt, 0, revision, 1.0))
            else:
                scored += [one(step, prompt, sample, answer, float(sample % 2)) for sample in range(3)]
            if kind == "reflect":
                scored += [one(step, prompt, sample, repair, float(sample), "/ref") for sample in range(2)]
        write_traces(folder, step, scored)


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_steps(worlds: Worlds, root: Path, setting: str) -> None:
    run = load(config_of(root, setting), overrides_of(root, setting))
    check(run)
    worlds(2).run(train, run, init=False)
    lines = [json.loads(line) for line in (run.paths.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["optim/skipped"] == 0, line
        assert [name for name in line if name.startswith("loss/") and name != "loss/total"], line


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_objective_brings_its_files(kind: str) -> None:
    """Settings that name it, a page that explains it, an oracle, and tests of its pitfalls."""
    assert load_kind(kind) == kind
    page = (PROJECT / "docs" / "objectives" / f"{kind}.md").read_text()
    assert page.startswith("# ")
    assert (PROJECT / "tests" / "oracles" / f"{kind}.py").is_file()
    assert (PROJECT / "tests" / "unit" / "objectives" / f"test_{kind}.py").is_file()
    assert f"docs/objectives/{kind}.md" in (PROJECT / "README.md").read_text()


def load_kind(kind: str) -> str:
    text = (CONFIGS / f"{kind}.yaml").read_text()
    return next(line.split(":")[1].strip() for line in text.splitlines() if line.strip().startswith("kind:"))
