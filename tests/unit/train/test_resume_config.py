"""Going on in a run folder: settings that change what is learned are refused, the others are not."""

import json
import re
from dataclasses import asdict

import pytest

from megatron_distill.config import load, save
from megatron_distill.errors import ConfigError, DistillError
from megatron_distill.models.spec import ModelSpec
from megatron_distill.testing.tiny import tiny_model
from megatron_distill.train.resume import check_checkpoint, finished, steps_done


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("resume") / "student", "qwen3", hidden=32)


@pytest.fixture
def config(student, tmp_path):
    """A function from overrides to a run whose folder holds a checkpoint after 2 of 3 steps."""
    (tmp_path / "run.yaml").write_text(f"""
base: [base, objectives/opd]
student: {{model: {student}}}
teachers: {{big: {{kind: frozen, model: {student}}}}}
data: {{prompts: data.jsonl}}
train: {{steps: 3}}
paths: {{run: {tmp_path / "run"}}}
""")
    saved = tmp_path / "run" / "checkpoints" / "step_000002"
    saved.mkdir(parents=True)
    spec = asdict(ModelSpec.from_folder(student))
    (saved / "state.json").write_text(json.dumps({"step": 2, "spec": spec}))
    (saved / "COMPLETE").touch()
    save(load(tmp_path / "run.yaml"), tmp_path / "run" / "config.yaml")
    return lambda *overrides: load(tmp_path / "run.yaml", overrides)


def complaints(run):
    with pytest.raises(ConfigError) as caught:
        check_checkpoint(run)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=9",
        "train={tokens_per_micro_batch: 100, chunk_rows: 7, on_nonfinite: skip}",
        "parallel={tp: 2, pp: 2, dp: 2}",
        "student.recompute=full",
        "eval={data: {prompts: other.jsonl}, every: 1}",
        "checkpoint.every=1",
        "metrics.console=false",
        "rollout.record=true",
    ],
)
def test_what_does_not_change_the_learning_may_change(config, override):
    (note,) = check_checkpoint(config(override))
    assert note.startswith("going on from ")


@pytest.mark.parametrize(
    ("override", "begin", "was"),
    [
        ("optimizer.eps=0.5", "optimizer.eps=0.5: ", "1e-08"),
        ("train.seed=7", "train.seed=7: ", "1"),
        ("rollout.sampling.top_p=0.9", "rollout.sampling.top_p=0.9: ", "1.0"),
        ("rollout={kind: demonstrations}", 'rollout.kind="demonstrations": ', '"generate"'),
        ("data.prompts=other.jsonl", 'data.prompts="other.jsonl": ', '"data.jsonl"'),
        ("teachers.big=null", "teachers.big.kind=nothing: ", '"frozen"'),
        ("precision.dtype=bf16", 'precision.dtype="bf16": ', '"fp32"'),
    ],
)
def test_what_changes_the_learning_is_refused(config, tmp_path, override, begin, was):
    line = complaints(config(override))[0]
    assert line.startswith(begin)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    assert f": {checkpoint} was made with {was}; set it back to go on from there, or choose another paths.run" in line


def test_every_change_is_a_line_and_a_kind_stands_for_its_fields(config):
    lines = complaints(config("rollout={kind: demonstrations}", "train.seed=7"))
    assert [line.split("=")[0] for line in lines] == ["rollout.kind", "train.seed"]


def test_another_folder_is_another_run(config, tmp_path):
    assert check_checkpoint(config("optimizer.eps=0.5", f"paths.run={tmp_path / 'new'}")) == []


def test_a_saved_config_that_cannot_be_read_is_one_line(config, tmp_path):
    (tmp_path / "run" / "config.yaml").write_text("train: {stepz: 1}\n")
    with pytest.raises(DistillError, match=re.escape("cannot be read: student.model: required")):
        check_checkpoint(config())


def test_a_run_is_finished_when_a_checkpoint_has_all_steps(config, tmp_path):
    assert steps_done(config()) == 2
    assert not finished(config())
    assert finished(config("train.steps=2"))
    assert finished(config("train.steps=1"))
    (note,) = check_checkpoint(config("train.steps=2"))
    assert note.endswith("step_000002: all 2 steps are done; train.steps sets how many there are")
    fresh = config("train.steps=0", f"paths.run={tmp_path / 'new'}")
    assert steps_done(fresh) == 0
    assert not finished(fresh)
