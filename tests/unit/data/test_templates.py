import json
from pathlib import Path

import pytest

from megatron_distill.data.templates import compare, fingerprint, load_tokenizer, render, stop_ids
from megatron_distill.errors import DataError, ModelError
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer

TEXTS = ["the cat sat on the mat, the cat"] * 30


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_one_tokenizer_cuts_text_alike_beside_any_model(tmp_path: Path, family: str) -> None:
    alone = load_tokenizer(tiny_tokenizer(tmp_path / "alone", TEXTS, vocab_size=280))
    beside = load_tokenizer(tiny_tokenizer(tiny_model(tmp_path / "b", family, vocab_size=280), TEXTS, vocab_size=280))
    text = "the cat's 1234  mats\n\n<|im_end|> Ünï"
    assert beside(text)["input_ids"] == alone(text)["input_ids"]
    assert compare(alone, beside) is None
    assert fingerprint(alone) == fingerprint(beside)


def test_render_with_and_without_generation_prompt(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer(tmp_path))
    talk = [{"role": "user", "content": "hi"}]
    whole = render(tokenizer, talk)
    assert tokenizer.decode(whole) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    short = render(tokenizer, talk, add_generation_prompt=False)
    assert whole[: len(short)] == short
    assert tokenizer.decode(short).endswith("<|im_end|>\n")


def test_thinking_reaches_the_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer(tmp_path))
    tokenizer.chat_template = "{% if enable_thinking is defined %}{{ enable_thinking }}{% else %}unset{% endif %}"
    texts = [
        tokenizer.decode(render(tokenizer, [{"role": "user", "content": ""}], thinking=value))
        for value in (None, True, False)
    ]
    assert texts == ["unset", "True", "False"]


def test_templates_that_cannot_be_used(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer(tmp_path))
    tokenizer.chat_template = "{{ raise_exception('only users speak') }}"
    with pytest.raises(DataError, match="roles system, user: only users speak"):
        render(tokenizer, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    for broken in ("{{ messages[0]['content'] + none }}", "{{ 'x'.index('y') }}", "{{ 1 // 0 }}"):
        tokenizer.chat_template = broken
        with pytest.raises(DataError, match="the chat template refuses messages with roles user: "):
            render(tokenizer, [{"role": "user", "content": "b"}])
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        render(tokenizer, [{"role": "user", "content": "b"}])


def test_missing_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_code_in_a_tokenizer_folder_never_runs(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the folder ran')")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_stop_ids_join_tokenizer_and_generation_config(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer(tmp_path))
    assert stop_ids(tokenizer, tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert stop_ids(tokenizer, tmp_path) == (0, 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert stop_ids(tokenizer, tmp_path) == (1, 2)
    tokenizer.eos_token = None
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        stop_ids(tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"eos_token_id": [0, 2', "not valid JSON"),
        ("[2]", "must hold one JSON object"),
        ('{"eos_token_id": "<|im_end|>"}', "eos_token_id must be an id or a list of ids, is '<|im_end|>'"),
        ('{"eos_token_id": [1, null]}', r"must be an id or a list of ids, is \[1, None\]"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_a_broken_generation_config_is_named(tmp_path: Path, text: str | bytes, reason: str) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer(tmp_path))
    (tmp_path / "generation_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=rf"generation_config\.json: .*{reason.replace('|', '.')}"):
        stop_ids(tokenizer, tmp_path)


def test_different_tokenizers_of_one_size_are_told_apart(tmp_path: Path) -> None:
    student = load_tokenizer(tiny_tokenizer(tmp_path / "s", TEXTS, vocab_size=265))
    teacher = load_tokenizer(tiny_tokenizer(tmp_path / "t", ["dog dig dug"] * 30, vocab_size=265))
    assert len(student) == len(teacher)
    difference = compare(student, teacher)
    assert difference is not None
    assert "id 259 is 'at' and" in difference
    assert "of 265 tokens" in difference


def test_another_end_of_sequence_is_told(tmp_path: Path) -> None:
    student = load_tokenizer(tiny_tokenizer(tmp_path / "s"))
    teacher = load_tokenizer(tiny_tokenizer(tmp_path / "t"))
    teacher.eos_token = "<|endoftext|>"
    difference = compare(student, teacher)
    assert difference is not None
    assert "'<|im_end|>' and '<|endoftext|>'" in difference
