import itertools
import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from megatron_distill.data.prompts import DataSection, load_prompts
from megatron_distill.data.templates import load_tokenizer
from megatron_distill.eval.runner import EvalSection, evaluate, pass_at, summary
from megatron_distill.rewards.exact import Exact
from megatron_distill.rollout.base import Sampling, WholeWeights
from megatron_distill.rollout.engines.base import Serving
from megatron_distill.rollout.engines.embedded import Embedded
from megatron_distill.rollout.sample import Tools
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop


@pytest.mark.parametrize("tries", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(tries: int) -> None:
    for right in range(tries + 1):
        answers = [index < right for index in range(tries)]
        for k in range(1, tries + 1):
            subsets = list(itertools.combinations(answers, k))
            assert pass_at(tries, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_of_many_samples() -> None:
    assert pass_at(10000, 0, 100) == 0.0
    assert pass_at(10000, 9950, 100) == 1.0
    assert 0 < pass_at(10000, 1, 5000) == pytest.approx(0.5)
    assert not math.isnan(pass_at(10000, 3, 9000))


def scored(reward: float | None, stop: Stop, length: int) -> Scored:
    rollout = Rollout(
        prompt=Prompt(id="0", messages=(), tokens=(1,)),
        group="0",
        sample=0,
        tokens=(5,) * length,
        logprobs=None,
        origin=(Origin.STUDENT,) * length,
        stop=stop,
        version=0,
    )
    return Scored(rollout=rollout, reward=reward)


def test_summary_by_hand() -> None:
    right, wrong = scored(1.0, Stop.EOS, 4), scored(0.0, Stop.LENGTH, 8)
    unscored = scored(None, Stop.EOS, 3)
    section = EvalSection(samples=3, pass_at=(1, 3))
    found = {
        metric.name: metric.value for metric in summary([[right, wrong, wrong], [right, right, unscored]], section)
    }
    assert found == pytest.approx(
        {
            "eval/avg_at_3": 3 / 5,
            "eval/pass_at_1": (1 / 3 + 1) / 2,
            "eval/pass_at_3": 1.0,  # of the one prompt with three scored answers
            "eval/length_mean": 31 / 6,
            "eval/truncated": 2 / 6,
            "eval/unscored": 1 / 6,
        }
    )


class Alone:
    rank, world = 0, 1

    def gather_objects[T](self, value: T) -> list[T]:
        return [value]


def test_evaluation_writes_every_answer(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tiny_model(tmp_path / "model", "llama", hidden=32))
    rows = [{"question": f"{a}+1?", "answer": str(a + 1)} for a in range(3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(prompts=tmp_path / "test.jsonl")
    section = EvalSection(data=data, samples=2, pass_at=(1, 2), sampling=Sampling(max_new_tokens=6))
    tokenizer = load_tokenizer(folder)
    engine = Embedded().connect(Serving(folder=folder, tokenizer=tokenizer, ranks=Alone()))
    engine.load_weights(WholeWeights(AutoModelForCausalLM.from_pretrained(folder).state_dict().items), version=0)
    tools = Tools(engine=engine, judge=Exact().connect(), tokenizer=tokenizer, ranks=Alone())
    prompts = load_prompts(data, tokenizer)
    metrics = evaluate(tools, prompts, section, step=40, seed=1, folder=tmp_path / "samples")
    assert {metric.name: metric.count for metric in metrics}["eval/avg_at_2"] == 6
    written = [json.loads(line) for line in (tmp_path / "samples" / "step_000040.jsonl").read_text().splitlines()]
    assert [(line["question"], line["sample"]) for line in written] == [
        (f"{a}+1?", s) for a in range(3) for s in (0, 1)
    ]
    assert {line["answer"] for line in written} == {"1", "2", "3"}
    again = evaluate(tools, prompts, section, step=80, seed=1)
    assert again == metrics, "the same model is asked with the same draws at any step"


def test_when_evaluation_is_due() -> None:
    data = DataSection(prompts=Path("x.jsonl"))
    assert [step for step in range(1, 10) if EvalSection(data=data, every=4).due(step)] == [4, 8]
    assert not EvalSection(data=data).due(4)
    assert not EvalSection(every=4).due(4)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"pass_at=\[4\]: each must be from 1 to samples=2"):
        EvalSection(samples=2, pass_at=(4,))
