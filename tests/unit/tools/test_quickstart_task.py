"""The quickstart's task is right, the same every time, and nothing held out was seen in training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from megatron_distill.data.prompts import DataSection, load_prompts
from megatron_distill.data.templates import compare, load_tokenizer
from megatron_distill.models.spec import ModelSpec
from megatron_distill.rewards.exact import Exact
from tools.quickstart import task

STEP = re.compile(r"(\d)\+(\d)\+([01])=(\d+)")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of the real size."""
    folder = tmp_path_factory.mktemp("quickstart")
    task.make(folder, seed=1)
    return folder


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def numbers(question: str) -> tuple[int, int]:
    left, right = re.findall(r"\d+", question)
    return int(left), int(right)


def test_every_worked_step_and_every_result_is_right(made: Path) -> None:
    for row in rows(made / "task" / task.TRAIN) + rows(made / "task" / task.HELD_OUT):
        left, right = numbers(row["question"])
        *lines, last = row["answer"].splitlines()
        columns = [tuple(map(int, STEP.fullmatch(line).groups())) for line in lines]
        assert all(a + b + carry == total for a, b, carry, total in columns), row
        assert [carry for _, _, carry, _ in columns] == [0, *(total // 10 for *_, total in columns[:-1])], row
        assert (left, right) == tuple(
            sum(column[side] * 10**place for place, column in enumerate(columns)) for side in (0, 1)
        )
        assert last == f"#### {left + right}"


def test_held_out_sums_were_never_trained_on_either_way_round(made: Path) -> None:
    train = {frozenset(numbers(row["question"])) for row in rows(made / "task" / task.TRAIN)}
    held_out = {frozenset(numbers(row["question"])) for row in rows(made / "task" / task.HELD_OUT)}
    assert (len(train), len(held_out)) == (task.TRAIN_PROBLEMS, task.HELD_OUT_PROBLEMS)
    assert not train & held_out


def test_prompts_and_verifier_read_the_files_as_they_read_gsm8k(made: Path) -> None:
    section = DataSection(
        prompts=made / "task" / task.HELD_OUT, answer_after="####", solution_key="answer", max_prompt_tokens=32
    )
    prompts = load_prompts(section, load_tokenizer(made / "models" / "student"))
    worked = [(prompt.answer, prompt.hints["solution"]) for prompt in prompts]
    assert len(prompts) == task.HELD_OUT_PROBLEMS
    assert [verdict.reward for verdict in Exact().connect().score(worked)] == [1.0] * len(prompts)


def test_tokenizer_keeps_digits_apart_and_loses_nothing(made: Path) -> None:
    tokenizer = load_tokenizer(made / "models" / "student")
    text = "What is 478+356?\n8+6+0=14\n#### 834 (any ASCII: ~{}|)"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert not [piece for piece in pieces if len(piece) > 1 and not piece.isalpha()]
    assert compare(tokenizer, load_tokenizer(made / "models" / "teacher")) is None


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_models_are_folders_that_transformers_and_two_processes_can_use(made: Path, name: str) -> None:
    folder = made / "models" / name
    spec = ModelSpec.from_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert spec.vocab_size == model.config.vocab_size == len(load_tokenizer(folder))
    assert spec.num_heads % 2 == spec.num_kv_heads % 2 == spec.ffn_hidden_size % 2 == 0


def test_same_seed_gives_the_same_files_and_another_seed_others(made: Path, tmp_path: Path) -> None:
    for name, seed in (("again", 1), ("other", 2)):
        task.make(tmp_path / name, seed)
    files = ["task/train.jsonl", "task/held_out.jsonl", "models/student/model.safetensors"]
    first, again, other = (
        [(folder / file).read_bytes() for file in files] for folder in (made, tmp_path / "again", tmp_path / "other")
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
