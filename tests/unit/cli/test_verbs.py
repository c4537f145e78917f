"""What the verbs print."""

import json
from dataclasses import asdict

import pytest
import yaml

from megatron_distill.cli.__main__ import main
from megatron_distill.models.spec import ModelSpec
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer(tiny_model(tmp_path / "student", "qwen2", hidden=32))
    text = "base: [base, objectives/opd]\nstudent: {model: student}\nteachers: {big: {kind: frozen, model: student}}\n"
    (tmp_path / "run.yaml").write_text(text + "data: {prompts: data.jsonl}\n")
    return "run.yaml"


@pytest.mark.parametrize("words", [["train", "--help"], ["config", "-h"], ["eval", "--help"]])
def test_help_documents_every_field(capsys, words):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0
    told = capsys.readouterr().out
    for head in ("student.model  path  (required)", "train.steps  int = 100", "objective.kind = opd", "eval.every"):
        assert f"\n{head}" in told
    assert "Optimizer steps of the whole run" in told


def test_config_prints_what_loads_again(config, capsys, tmp_path):
    assert main(["config", config, "train.steps=7"]) == 0
    told = capsys.readouterr().out
    assert yaml.safe_load(told)["train"]["steps"] == 7
    assert told.endswith("# checks: all passed\n")
    (tmp_path / "again.yaml").write_text(told)
    assert main(["config", "again.yaml"]) == 0
    assert capsys.readouterr().out == told


def test_config_prints_the_tree_even_when_a_check_fails(config, capsys):
    assert main(["config", config, "parallel.pp=4"]) == 2
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["parallel"]["pp"] == 4
    assert err.startswith("error: parallel.pp=4: does not divide the 2 layers")


def test_config_prints_a_schema(capsys):
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["train"]


def test_a_finished_run_starts_nothing(config, capsys, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    saved = tmp_path / "runs" / "run" / "checkpoints" / "step_000003"
    saved.mkdir(parents=True)
    spec = asdict(ModelSpec.from_folder(tmp_path / "student"))
    (saved / "state.json").write_text(json.dumps({"step": 3, "spec": spec}))
    (saved / "COMPLETE").touch()
    assert main(["train", config, "train.steps=3"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("runs/run/checkpoints/step_000003: all 3 steps are done")
    assert [path.name for path in (tmp_path / "runs" / "run").iterdir()] == ["checkpoints"]
