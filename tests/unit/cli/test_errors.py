"""Bad input, as a person meets it: one clear line on stderr each, exit code 2, no traceback, nothing left behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_distill.cli.__main__ import main
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.train.folder import claim

PROJECT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("errors") / "student", "qwen2", hidden=32)
    return tiny_tokenizer(folder)


@pytest.fixture
def config(student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(f"""
base: [base, objectives/opd]
student: {{model: {student}}}
teachers: {{big: {{kind: frozen, model: {student}}}}}
reward: {{kind: exact}}
data: {{prompts: data.jsonl}}
parallel: {{tp: 2}}
paths: {{run: run}}
""")
    return tmp_path / "run.yaml"


def refused(capsys, *words):
    """The lines on stderr of a command that must be refused."""
    assert main(["train", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert not Path("run").exists()
    assert all(line.startswith("error: ") for line in err.splitlines())
    return [line.removeprefix("error: ") for line in err.splitlines()]


@pytest.mark.parametrize(
    ("override", "begin"),
    [
        ("train.stepz=5", "train.stepz=5: unknown key; did you mean 'steps'? (command line)"),
        ("train.steps=few", 'train.steps="few": must be a valid integer (command line)'),
        ("student.model=nowhere", "student.model: nowhere: no such"),
        ("parallel.tp=3", "parallel.tp=3: does not divide the 4 attention heads of student.model, the 2 key"),
        ("data.prompts=nothing.jsonl", "nothing.jsonl: "),
        ("data.max_prompt_tokens=5", "data.jsonl:1 with "),
        ("precision={dtype: bf16, fp8: {}}", "precision.fp8 needs TransformerEngine on a GPU"),
        ("steps", "'steps': not an override; write section.field=value"),
    ],
)
def test_a_bad_setting(config, capsys, override, begin):
    (line,) = refused(capsys, config, override)
    assert line.startswith(begin)


def test_tokenizers_that_differ(config, capsys, student, tmp_path):
    shutil.copytree(student, tmp_path / "other")
    tiny_tokenizer(tmp_path / "other", ["1 + 1 = 2 and more"] * 9, vocab_size=270)
    (line,) = refused(capsys, config, f"teachers.big.model={tmp_path / 'other'}")
    assert line.startswith("tokenizers of student")


def test_a_broken_line_of_data(config, capsys, tmp_path):
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('{"question": "1 + 1?", "answer"\n')
    (line,) = refused(capsys, config)
    assert line.startswith("data.jsonl:5: ")


def test_an_empty_data_set(config, capsys, tmp_path):
    (tmp_path / "data.jsonl").write_text("\n")
    (line,) = refused(capsys, config)
    assert line.startswith("data.jsonl: ")


def test_a_checkpoint_of_another_model(config, capsys, tmp_path):
    saved = tmp_path / "old" / "checkpoints" / "step_000002"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"step": 2, "spec": {"num_layers": 7}}))
    (saved / "COMPLETE").touch()
    (line,) = refused(capsys, config, "paths.run=old")
    assert line.startswith("old/checkpoints/step_000002: checkpoint of another model (")


def test_a_run_folder_that_cannot_be_made(config, capsys):
    assert main(["train", str(config), "paths.run=data.jsonl/run"]) == 2
    assert capsys.readouterr().err.startswith("error: paths.run: data.jsonl/run cannot be written (Not a directory)")


def test_a_run_folder_that_is_in_use(config, capsys):
    with claim(Path("taken")):
        assert main(["train", str(config), "paths.run=taken"]) == 2
    assert capsys.readouterr().err.startswith("error: paths.run: taken is in use by process ")
    assert [path.name for path in Path("taken").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("output", "told"),
    [("data.jsonl/out.json", "data.jsonl cannot be written (File exists)"), (".", ". is a folder; name a file")],
)
def test_an_evaluation_whose_numbers_cannot_be_written(config, capsys, output, told):
    assert main(["eval", str(config), "eval.data.prompts=data.jsonl", "--output", output]) == 2
    assert capsys.readouterr().err.startswith(f"error: --output: {told}")


def test_srun_without_torchrun(config, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    (line,) = refused(capsys, config)
    assert line.startswith("srun started 4 of this command")


@pytest.mark.parametrize(
    ("words", "begin"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such config file"),
        ([], "the following arguments are required: CONFIG"),
        (["run.yaml", "--steps"], "--steps: no such option"),
    ],
)
def test_a_bad_command(config, capsys, words, begin):
    (line,) = refused(capsys, *words)
    assert line.startswith(begin)


def test_the_command_itself_ends_with_code_2(config):
    command = [sys.executable, "-m", "megatron_distill.cli", "train", str(config), "train.steps=few"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == 'error: train.steps="few": must be a valid integer (command line)\n'
