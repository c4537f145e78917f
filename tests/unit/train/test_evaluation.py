"""Evaluations are checked before they start, and what they report can be read by anybody."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_distill.config import load
from megatron_distill.errors import DistillError
from megatron_distill.rollout.engines.embedded import Embedded
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.train.evaluation import Report, check_evaluable, engine_part, evaluate_model


@pytest.fixture
def config(tmp_path):
    """A function from overrides to a run whose model is asked four questions."""
    tiny_tokenizer(tiny_model(tmp_path / "student", "qwen3", hidden=32))
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(f"""
base: [base, objectives/opd]
student: {{model: {tmp_path / "student"}}}
teachers: {{big: {{kind: frozen, model: nowhere}}}}
reward: {{kind: exact}}
data: {{prompts: nowhere.jsonl}}
eval: {{data: {{prompts: {tmp_path / "data.jsonl"}}}}}
""")
    return lambda *overrides: load(tmp_path / "run.yaml", overrides)


def test_only_what_is_evaluated_must_be_there(config):
    assert check_evaluable(config()) == ["eval.data: 4 prompts"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("eval.data=null", "eval.data: nothing to evaluate on"),
        ("reward={kind: none}", "reward.kind=none: judges no answer"),
        ("eval.sampling.max_new_tokens=600", "eval.sampling.max_new_tokens=600: with the longest prompt"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(config, override, told):
    with pytest.raises(DistillError) as caught:
        check_evaluable(config(override))
    assert str(caught.value).startswith(told)


def test_a_report_is_json_for_everybody(tmp_path):
    report = Report(model=tmp_path, problems=2, metrics={"eval/avg_at_1": math.nan, "eval/unscored": 1.0})
    report.write(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read["metrics"] == {"eval/avg_at_1": "NaN", "eval/unscored": 1.0}


def test_a_folder_with_tensors_that_no_model_needs_is_evaluated(config, tmp_path):
    run = config("eval.sampling={temperature: 0, max_new_tokens: 4}")
    plain = evaluate_model(run, responses=tmp_path / "plain")
    weights = tmp_path / "student" / "model.safetensors"
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(weights) | frequencies, weights, metadata={"format": "pt"})
    assert check_evaluable(run)
    assert evaluate_model(run, responses=tmp_path / "more") == plain
    name = "step_000000.jsonl"
    assert (tmp_path / "more" / name).read_text() == (tmp_path / "plain" / name).read_text()


def test_the_engine_is_set_as_in_the_run(config):
    assert engine_part(config("rollout.engine.batch_size=3")) == Embedded(batch_size=3)
    assert engine_part(config("rollout={kind: replay, path: nowhere}")) == Embedded()
