import json
from pathlib import Path

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from megatron_distill.data.prompts import DataSection, load_prompts
from megatron_distill.data.templates import load_tokenizer
from megatron_distill.errors import DataError
from megatron_distill.testing.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


ROWS = [
    {"question": "2+3?", "answer": "two and three\n#### 5"},
    {"question": "900+334?", "answer": "that is\n#### 1,234"},
]


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gsm8k_rows_become_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    section = DataSection(
        prompts=lines(tmp_path / "train.jsonl", ROWS),
        answer_after="####",
        solution_key="answer",
        system="Be brief.",
        instruction="End with ####.",
    )
    prompts = load_prompts(section, tokenizer)
    assert len(prompts) == 2
    assert prompts.skipped == 0
    assert [prompt.answer for prompt in prompts] == ["5", "1234"]
    assert prompts[0].hints["solution"] == "two and three\n#### 5"
    assert tokenizer.decode(prompts[0].tokens) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+3?\nEnd with ####.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompts[0].id.startswith("0-")
    assert prompts[0].id != prompts[1].id


def test_ids_are_stable_and_follow_the_content(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    first = load_prompts(DataSection(prompts=lines(tmp_path / "a.jsonl", ROWS)), tokenizer)
    again = load_prompts(DataSection(prompts=lines(tmp_path / "b.jsonl", ROWS)), tokenizer)
    other = load_prompts(DataSection(prompts=lines(tmp_path / "c.jsonl", [ROWS[1], ROWS[1]])), tokenizer)
    assert [p.id for p in first] == [p.id for p in again]
    assert other[0].id != first[0].id
    assert other[1].id == first[1].id


def test_messages_with_an_answering_turn(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    section = DataSection(
        prompts=lines(tmp_path / "a.jsonl", [{"talk": talk}]), messages_key="talk", answer_key=None, system="S"
    )
    prompt = load_prompts(section, tokenizer)[0]
    assert [message["role"] for message in prompt.messages] == ["system", "user"]
    assert prompt.hints == {"solution": "hello"}
    assert prompt.answer is None


@pytest.mark.parametrize(("given", "gold"), [(27.0, "27"), (2.5, "2.5"), (7, "7"), (["1", 2.0], "1, 2"), (None, None)])
def test_gold_answers_of_other_types(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, given: object, gold: str | None
) -> None:
    path = lines(tmp_path / "a.jsonl", [{"question": "?", "answer": given}])
    assert load_prompts(DataSection(prompts=path), tokenizer)[0].answer == gold


@pytest.mark.parametrize(
    ("given", "gold"),
    [("1,234,567", "1234567"), ("1, 2", "1, 2"), ("(3,4)", "(3,4)"), ("x,y", "x,y")],
)
def test_only_thousands_commas_leave_a_gold_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, given: str, gold: str
) -> None:
    path = lines(tmp_path / "a.jsonl", [{"question": "?", "answer": f"#### {given}"}])
    assert load_prompts(DataSection(prompts=path, answer_after="####"), tokenizer)[0].answer == gold


def test_parquet_and_saved_data_sets_read_like_jsonl(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    expected = load_prompts(DataSection(prompts=lines(tmp_path / "a.jsonl", ROWS)), tokenizer)
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "splits")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    table.select([0]).to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    places = [("a.parquet", None), ("saved", None), ("splits", "train"), ("hub", "train")]
    for name, split in places:
        found = load_prompts(DataSection(prompts=tmp_path / name, split=split), tokenizer)
        assert [(p.id, p.tokens, p.answer) for p in found] == [(p.id, p.tokens, p.answer) for p in expected], name


@pytest.mark.parametrize("name", ["splits", "hub"])
def test_splits_are_never_mixed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "splits")
    (tmp_path / "hub").mkdir()
    lines(tmp_path / "hub" / "train.jsonl", ROWS)
    lines(tmp_path / "hub" / "test.jsonl", ROWS)
    with pytest.raises(DataError, match=r"data\.split is not set.*holds (test, train|train, test)"):
        load_prompts(DataSection(prompts=tmp_path / name), tokenizer)


def test_broken_line_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n\n{"question": "b", "ans\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: not valid JSON at column"):
        load_prompts(DataSection(prompts=path), tokenizer)
    path.write_bytes(b'{"question": "a", "answer": "1"}\n{"question": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not UTF-8"):
        load_prompts(DataSection(prompts=path), tokenizer)
    path.write_text("[1, 2]\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: one JSON object per line"):
        load_prompts(DataSection(prompts=path), tokenizer)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (r'"half \ud83d"', r"'\\ud83d' is half a character"),
        ("1" * 5000, "not usable JSON: Exceeds the limit"),
        ("[" * 100_000, "not usable JSON: maximum recursion depth"),
    ],
    ids=["half a character", "huge number", "deep nesting"],
)
def test_values_that_nothing_can_hold_are_refused_with_their_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, value: str, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "whole \\ud83d\\ude00", "answer": "1"}\n{"question": "b", "answer": ' + value + "}\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {reason}"):
        load_prompts(DataSection(prompts=path), tokenizer)


def test_half_a_character_in_a_setting_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    section = DataSection(prompts=lines(tmp_path / "a.jsonl", ROWS), system="half \ud83d")
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*surrogates not allowed"):
        load_prompts(section, tokenizer)


def test_missing_key_names_the_nearest(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = lines(tmp_path / "a.jsonl", [{"questions": "a", "answer": "1"}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: no key 'question'.*did you mean 'questions'\?"):
        load_prompts(DataSection(prompts=path), tokenizer)
    path = lines(tmp_path / "b.jsonl", [{"question": "a"}])
    with pytest.raises(DataError, match=r"no key 'answer' \(data\.answer_key, null when there is no gold answer\)"):
        load_prompts(DataSection(prompts=path), tokenizer)


def test_unusable_values_are_refused_with_their_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    good: dict[str, object] = {"question": "a", "answer": "#### 1"}
    cases: list[tuple[dict[str, object], str]] = [
        ({"question": 3, "answer": "#### 1"}, "'question' must be a text"),
        ({"question": "a", "answer": "1"}, "'answer' holds no '####'"),
    ]
    for row, reason in cases:
        path = lines(tmp_path / "a.jsonl", [good, row])
        with pytest.raises(DataError, match=rf"a\.jsonl:2: {reason}"):
            load_prompts(DataSection(prompts=path, answer_after="####"), tokenizer)
    path = lines(tmp_path / "a.jsonl", [{"m": [{"role": "user"}], "answer": "1"}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'm' must be a list of \{role, content\}"):
        load_prompts(DataSection(prompts=path, messages_key="m"), tokenizer)
    path = lines(tmp_path / "a.jsonl", [{"m": [{"role": "assistant", "content": "x"}], "answer": "1"}])
    with pytest.raises(DataError, match="needs a user turn"):
        load_prompts(DataSection(prompts=path, messages_key="m"), tokenizer)


@pytest.mark.parametrize("make", ["missing", "empty", "type", "folder", "parquet"])
def test_nothing_to_read_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, make: str) -> None:
    path, reason = {
        "missing": (tmp_path / "none.jsonl", "no such file or folder"),
        "empty": (tmp_path / "a.jsonl", "no prompts"),
        "type": (tmp_path / "a.pkl", "unknown type '.pkl'; allowed: .jsonl"),
        "folder": (tmp_path / "f", "holds no data"),
        "parquet": (tmp_path / "a.parquet", "not a readable parquet file"),
    }[make]
    if make == "folder":
        path.mkdir()
    elif make != "missing":
        path.write_text("\n" if make == "empty" else "x")
    with pytest.raises(DataError, match=reason):
        load_prompts(DataSection(prompts=path), tokenizer)


def test_long_prompts_are_counted_or_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [ROWS[0], {"question": "x" * 400, "answer": "1"}, {"question": "y" * 500, "answer": "1"}]
    path = lines(tmp_path / "a.jsonl", rows)
    skipping = load_prompts(DataSection(prompts=path, max_prompt_tokens=100, long_prompts="skip"), tokenizer)
    assert (len(skipping), skipping.skipped) == (1, 2)
    with pytest.raises(DataError, match=r"a\.jsonl:2 with \d+ tokens: longer than .*=100, the first of 2"):
        load_prompts(DataSection(prompts=path, max_prompt_tokens=100), tokenizer)
    with pytest.raises(DataError, match="no prompts; all 3 are over"):
        load_prompts(DataSection(prompts=path, max_prompt_tokens=2, long_prompts="skip"), tokenizer)


def test_limit_takes_the_first_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\nbroken\n")
    assert len(load_prompts(DataSection(prompts=path, limit=1), tokenizer)) == 1


def test_hints_are_texts_or_last_turns(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "three"}]
    rows: list[dict[str, object]] = [{"question": "1+1?", "answer": "2", "good": "two", "worse": turns, "note": 3}]
    path = lines(tmp_path / "pairs.jsonl", rows)
    section = DataSection(prompts=path, solution_key="good", hint_keys={"chosen": "good", "rejected": "worse"})
    assert load_prompts(section, tokenizer)[0].hints == {"solution": "two", "chosen": "two", "rejected": "three"}
    with pytest.raises(DataError, match=r"no key 'god' \(data\.hint_keys\.chosen\).*did you mean 'good'"):
        load_prompts(DataSection(prompts=path, hint_keys={"chosen": "god"}), tokenizer)
    with pytest.raises(DataError, match="'note' must be a text"):
        load_prompts(DataSection(prompts=path, hint_keys={"chosen": "note"}), tokenizer)
    with pytest.raises(ValueError, match=r"hint_keys\.solution: .*solution_key"):
        DataSection(prompts=path, hint_keys={"solution": "good"})
