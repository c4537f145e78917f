"""Files of a run are looked at before anything starts; what is wrong is one line each."""

import json
import shutil
import sys

import pytest

from megatron_distill.config import load
from megatron_distill.data.traces import write_traces
from megatron_distill.errors import DistillError
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.train.preflight import preflight
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop


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


def test_servers_need_something_to_run_with_and_room(config, tmp_path):
    served = ("rollout.engine.kind=sglang", f"rollout.engine.servers.python={sys.executable}")
    assert preflight(config(*served))
    nowhere = complaint(config("rollout.engine.kind=sglang", "rollout.engine.servers.python=no/python"))
    assert nowhere == "servers.python=no/python: not an interpreter that can be run"
    line = complaint(config(*served, "rollout.engine.servers.context_length=100"))
    assert "more than the 98 positions of rollout.engine.servers.context_length=100, less 2 that a server" in line
    assert "set it to 73 or less" in line
    assert "rollout.engine.servers.context_length=512" in complaint(
        config(*served, "rollout.sampling.max_new_tokens=486")
    )
    assert preflight(config("rollout.sampling.max_new_tokens=486")), "the engine in process has all positions"
    line = complaint(config(*served, f"rollout.engine.servers.api_key_file={tmp_path / 'key'}"))
    assert line.startswith("api_key_file=")
    elsewhere = 'rollout.engine={kind: sglang, urls: ["http://localhost:1"], servers: {python: no/python}}'
    assert preflight(config(elsewhere)), "servers that run already need no interpreter here"


def test_demonstrations_need_solutions(config):
    sft = ("objective={kind: sft}", "teachers.big=null", "rollout={kind: demonstrations}")
    assert "solution" in complaint(config(*sft))
    assert preflight(config(*sft, "data.solution_key=answer"))


SFT = ("objective={kind: sft}", "teachers.big=null", "data.solution_key=answer")


def test_solutions_that_no_model_was_made_for_are_refused(config, tmp_path):
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps({"question": "1 + 1?", "answer": "2" * 600}) + "\n")
    line = complaint(config(*SFT, "rollout={kind: demonstrations}"))
    assert line.startswith("rollout.max_response_tokens=4096: prompt ")
    assert "more than the 512 positions of student.model: set it to 4" in line
    assert preflight(config(*SFT, "rollout={kind: demonstrations, max_response_tokens: 400}"))


@pytest.mark.parametrize("rollout", ["rollout={kind: demonstrations}", "rollout={kind: generate}"])
def test_a_tokenizer_without_an_end_is_refused(config, student, tmp_path, rollout):
    shutil.copytree(student, tmp_path / "endless")
    settings = json.loads((tmp_path / "endless" / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "endless" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "endless" / "generation_config.json").unlink(missing_ok=True)
    line = complaint(config(*SFT, rollout, f"student.model={tmp_path / 'endless'}"))
    assert line.endswith("endless: no end-of-sequence token; name eos_token in tokenizer_config.json")


def test_ids_that_a_model_lacks_are_refused(config, student, tmp_path):
    tiny_model(tmp_path / "teacher", "qwen3", hidden=32, vocab_size=200)
    line = complaint(config())
    assert line.startswith(f"{student}: the tokenizer's id 258 (")
    assert "is outside the vocabulary of teachers.big.model, which has ids below 200" in line
    tiny_model(tmp_path / "teacher", "qwen3", hidden=32, vocab_size=300)
    assert preflight(config())


def test_weights_that_do_not_fit_the_config_are_refused(config, tmp_path):
    settings = json.loads((tmp_path / "teacher" / "config.json").read_text())
    for change, told in (
        ({"intermediate_size": 48}, "mlp.gate_proj.weight is (64, 32), the config says (48, 32)"),
        ({"num_hidden_layers": 3}, "tensors missing, first model.layers.2."),
    ):
        (tmp_path / "teacher" / "config.json").write_text(json.dumps(settings | change))
        assert told in complaint(config())


def recorded(folder, *, steps=1, tokens=(5, 2)):
    prompt = Prompt(id="a", messages=(), tokens=(1, 4))
    rollout = Rollout(
        prompt=prompt,
        group="0",
        sample=0,
        tokens=tokens,
        logprobs=None,
        origin=(Origin.STUDENT,) * len(tokens),
        stop=Stop.EOS,
        version=0,
    )
    for step in range(steps):
        write_traces(folder, step, [Scored(rollout=rollout, reward=None)])
    return f"rollout={{kind: replay, path: {folder}}}"


def test_recorded_rollouts_must_last_for_all_steps(config, tmp_path):
    replay = recorded(tmp_path / "traces", steps=3)
    assert preflight(config(replay, "train.steps=3"))
    line = complaint(config(replay, "train.steps=4"))
    assert line.startswith(f"{tmp_path / 'traces'}: no rollouts of step 3; it holds steps 0 to 2")


def test_recorded_rollouts_must_fit_the_models(config, tmp_path):
    other = recorded(tmp_path / "other", tokens=(700, 2))
    assert "step 0 holds token id 700, the run's models share the ids below 259" in complaint(
        config(other, "train.steps=1")
    )
    long = recorded(tmp_path / "long", tokens=(5,) * 511)
    assert "step 0 holds a prompt and response of 513 tokens, more than the 512 positions" in complaint(
        config(long, "train.steps=1")
    )


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


def test_pairs_need_both_responses_within_the_limits(config, tmp_path):
    rows = [{"question": f"{n}?", "good": "right", "bad": "wrong" * (1 + 20 * n)} for n in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = ("objective={kind: redi}", "teachers.big=null", "reward={kind: none}", "data.answer_key=null")
    both = (*pairs, "data.hint_keys={chosen: good, rejected: bad}")
    source = "rollout={kind: pairs, max_response_tokens: 110}"
    assert "3 of 3 prompts have no 'chosen' response" in complaint(config(*pairs, source))
    assert "prompt 2-" in complaint(config(*both, source))
    assert "has a response of 206 tokens, the first of 1 pairs" in complaint(config(*both, source))
    assert preflight(config(*both, source, "rollout.long_pairs=skip")) == ["data: 3 prompts"]
    assert "positions of student.model" in complaint(config(*both, "rollout={kind: pairs, max_response_tokens: 9999}"))


def test_what_a_teacher_is_shown_must_be_in_the_data(config):
    privileged = ("teachers.big=null", "teachers.me={kind: itself, weights: live, view: {privileged: {}}}")
    assert "teachers.me.view: 4 of 4 prompts" in complaint(config(*privileged))
    assert preflight(config(*privileged, "data.solution_key=answer")) == ["data: 4 prompts"]


@pytest.mark.parametrize("rollout", ["prefix", "revise, samples_per_prompt: 1", "reflect, samples_per_prompt: 8"])
def test_whatever_the_student_writes_must_fit_its_positions(config, rollout):
    run = config(f"rollout={{kind: {rollout}, sampling: {{max_new_tokens: 500}}}}", "data.solution_key=answer")
    assert "rollout.sampling.max_new_tokens=500: with the longest prompt" in complaint(run)


def test_a_teacher_that_begins_needs_something_to_begin_with(config):
    assert "4 of 4 prompts have no hint 'solution' to begin with" in complaint(config("rollout={kind: prefix}"))
    assert preflight(config("rollout={kind: prefix}", "data.solution_key=answer"))


def test_solutions_of_off_policy_steps_must_fit_too(config, tmp_path):
    mixed = ("objective.divergence=reverse_kl", "rollout.on_policy_fraction=0.5", "data.solution_key=answer")
    assert preflight(config(*mixed))
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps({"question": "1 + 1?", "answer": "2" * 600}) + "\n")
    assert "rollout.max_solution_tokens=4096: prompt" in complaint(config(*mixed))
