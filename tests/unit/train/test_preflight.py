"""Files of a run are looked at before anything starts; what is wrong is one line each."""

import json
import shutil

import pytest

from megatron_distill.config import load
from megatron_distill.errors import DistillError
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.train.preflight import preflight


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("preflight") / "student", "qwen3", hidden=32)
    return tiny_tokenizer(folder)


@pytest.fixture
def config(student, tmp_path):
    """A function from overrides to a run whose data are in data.jsonl."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(4)))
    shutil.copytree(student, tmp_path / "teacher")
    (tmp_path / "run.yaml").write_text(f"""
base: [base, objectives/opd]
student: {{model: {student}}}
teachers: {{big: {{kind: frozen, model: {tmp_path / "teacher"}}}}}
reward: {{kind: exact}}
data: {{prompts: {data}}}
paths: {{run: {tmp_path / "run"}}}
""")
    return lambda *overrides: load(tmp_path / "run.yaml", overrides)


def complaint(run):
    with pytest.raises(DistillError) as caught:
        preflight(run)
    return str(caught.value)


def test_a_sound_run_is_told_its_size(config):
    assert preflight(config()) == ["data: 4 prompts"]


def test_prompts_over_the_limit_are_refused_or_counted(config, tmp_path):
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps({"question": "1 + 1?" * 50, "answer": "2"}) + "\n")
    assert "data.jsonl:5" in complaint(config("data.max_prompt_tokens=100"))
    skipping = config("data.max_prompt_tokens=100", "data.long_prompts=skip")
    assert preflight(skipping) == ["data: 4 prompts, 1 over max_prompt_tokens left out"]


def test_a_broken_line_has_file_and_number(config, tmp_path):
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('{"question": ')
    assert "data.jsonl:5" in complaint(config())


def test_an_empty_data_set_is_refused(config, tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    assert "no prompts" in complaint(config())


def test_prompts_without_answers_are_refused_where_they_are_judged(config):
    assert "4 of 4 prompts have no gold answer" in complaint(config("data.answer_key=null"))
    assert preflight(config("data.answer_key=null", "reward={kind: none}"))


def test_lengths_that_no_model_was_made_for_are_refused(config):
    line = complaint(config("rollout.sampling.max_new_tokens=500"))
    assert line.startswith("rollout.sampling.max_new_tokens=500: with the longest prompt (")
    assert "more than the 512 positions of student.model: set it to 4" in line


def test_demonstrations_need_solutions(config):
    sft = ("objective={kind: sft}", "teachers.big=null", "rollout={kind: demonstrations}")
    assert "solution" in complaint(config(*sft))
    assert preflight(config(*sft, "data.solution_key=answer"))


def test_held_out_prompts_are_looked_at_too(config, tmp_path):
    run = config(f"eval.data.prompts={tmp_path / 'data.jsonl'}", "eval.every=1")
    assert preflight(run) == ["data: 4 prompts", "eval.data: 4 prompts"]
    assert "nowhere" in complaint(config("eval.data.prompts=nowhere.jsonl"))


def test_a_teacher_with_another_tokenizer_is_refused(config, tmp_path):
    tiny_tokenizer(tmp_path / "teacher", ["1 + 1 = 2 and more"] * 9, vocab_size=270)
    line = complaint(config())
    assert "tokenizers of student" in line
    assert "\n" not in line


def test_a_model_without_weights_is_refused(config, tmp_path):
    (tmp_path / "teacher" / "model.safetensors").unlink()
    assert "model.safetensors" in complaint(config())


def test_a_checkpoint_of_another_model_is_refused(config, tmp_path):
    saved = tmp_path / "run" / "checkpoints" / "step_000002"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"step": 2, "spec": {"num_layers": 7}}))
    (saved / "COMPLETE").touch()
    assert "checkpoint of another model (" in complaint(config())


def test_all_that_is_wrong_is_told_at_once(config, tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    assert len(complaint(config()).splitlines()) == 2
