"""`python -m tools.tiny_models`: two folders that a run can use at once; mistakes in one line."""

import json

import pytest

from megatron_distill.config import check, load
from megatron_distill.data.templates import load_tokenizer
from megatron_distill.models.spec import ModelSpec
from megatron_distill.train.preflight import preflight
from tools.tiny_models import main


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "train.jsonl"
    rows = [{"question": f"How many apples are {n} apples?", "answer": f"Apples.\n#### {n}"} for n in range(50)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_what_it_writes_is_ready_to_train(data, tmp_path, capsys):
    assert main([str(data), str(tmp_path / "models"), "--vocab-size", "300"]) == 0
    student, teacher = tmp_path / "models" / "student", tmp_path / "models" / "teacher"
    assert capsys.readouterr().out.splitlines() == [
        f"{student}: qwen3, 2 layers, hidden size 64, vocabulary 300",
        f"{teacher}: qwen3, 4 layers, hidden size 128, vocabulary 300",
    ]
    assert ModelSpec.from_folder(student).tied_embeddings
    assert len(load_tokenizer(student).encode(" apples")) == 1
    (tmp_path / "run.yaml").write_text(f"""
base: [base, objectives/opd]
student: {{model: {student}}}
teachers: {{main: {{kind: frozen, model: {teacher}}}}}
data: {{prompts: {data}, answer_after: "####"}}
reward: {{kind: exact}}
parallel: {{tp: 2, pp: 2}}
rollout: {{sampling: {{max_new_tokens: 48}}}}
paths: {{run: {tmp_path / "run"}}}
""")
    run = load(tmp_path / "run.yaml")
    check(run)
    assert preflight(run) == ["data: 50 prompts"]


def complaint(capsys, *words):
    assert main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_are_one_line(data, tmp_path, capsys):
    assert "nowhere.jsonl: no such file" in complaint(capsys, "nowhere.jsonl", tmp_path / "models")
    assert "must be a number from 259 on" in complaint(capsys, data, tmp_path / "models", "--vocab-size=100")
    assert "the following arguments are required: OUT" in complaint(capsys, data)
    (tmp_path / "numbers.jsonl").write_text('{"n": 1}\n')
    assert "no texts" in complaint(capsys, tmp_path / "numbers.jsonl", tmp_path / "models")
    (tmp_path / "models" / "teacher").mkdir(parents=True)
    assert "teacher: is there already" in complaint(capsys, data, tmp_path / "models")
