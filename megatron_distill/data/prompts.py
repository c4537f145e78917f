"""Prompts from JSONL, parquet and data set folders.

Files are read as data and nothing else: no pickle, no loading script. A row that cannot be used is an error that
names its file and line; only prompts over the limit may be skipped, and those are counted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from megatron_distill.data.rows import Row, read_rows
from megatron_distill.data.templates import render
from megatron_distill.errors import DataError
from megatron_distill.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(\D|$))")
"""The comma of 1,234; that of 1, 2 or (3,4) belongs to the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """Where prompts come from, and how a row becomes one."""

    prompts: Path
    """A JSONL or parquet file, a folder of them, or a folder written by `datasets.save_to_disk`."""
    split: str | None = None
    """Which part of a folder to read, e.g. `train`; needed where it holds several."""
    prompt_key: str = "question"
    """Column with the question."""
    messages_key: str | None = None
    """Column with chat messages (role, content), in place of `prompt_key`; a last assistant turn is the solution."""
    answer_key: str | None = "answer"
    """Column with the gold answer; null when there is none."""
    answer_after: str | None = None
    """The gold answer is what follows the last such marker, e.g. `####`, without thousands commas."""
    solution_key: str | None = None
    """Column with a worked solution, for demonstrations and privileged teachers."""
    hint_keys: Mapping[str, str] = field(default_factory=dict)
    """Further columns by the name under which they are known: `chosen` and `rejected` for pairs, what a teacher's view
    shows it. A column holds text, or chat messages of which the last turn counts."""
    source_key: str | None = None
    """Column with the name of a row's source, for teachers by source; else it is the name of the file or folder."""
    system: str | None = None
    """System message put before every conversation that has none."""
    instruction: str | None = None
    """Text added to the last user turn on a line of its own."""
    thinking: bool | None = None
    """Value of `enable_thinking` for chat templates that know it; null leaves it to the template."""
    limit: int | None = None
    """Use this many rows from the start."""
    shuffle: bool = True
    """Draw a new order in every epoch, from the run's seed."""
    max_prompt_tokens: int = 2048
    """Longest prompt, chat template included."""
    long_prompts: Literal["refuse", "skip"] = "refuse"
    """What to do about a longer one; skipped ones are counted and reported."""

    def __post_init__(self) -> None:
        for name in ("limit", "max_prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if "solution" in self.hint_keys:
            raise ValueError("hint_keys.solution: the worked solution has a setting of its own, solution_key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """All prompts of a section, in file order."""

    items: tuple[Prompt, ...]
    skipped: int
    """Prompts left out for their length."""
    shuffle: bool
    thinking: bool | None = None
    """The switch that they were rendered with; what is made of them later may follow it."""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Prompt:
        return self.items[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.items)


def load_prompts(section: DataSection, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Read, check and tokenise every row; needs no process group.

    Raises:
        DataError: a file, row or key that cannot be used, prompts over the limit, or none left.
    """
    kept: list[Prompt] = []
    too_long: list[str] = []
    rows = islice(read_rows(section.prompts, section.split), section.limit)
    for index, row in enumerate(rows):
        prompt = _prompt(row, index, section, tokenizer)
        if len(prompt.tokens) <= section.max_prompt_tokens:
            kept.append(prompt)
        else:
            too_long.append(f"{row.where} with {len(prompt.tokens)} tokens")
    if too_long and section.long_prompts == "refuse":
        raise DataError(
            f"{too_long[0]}: longer than data.max_prompt_tokens={section.max_prompt_tokens}, the first of "
            f"{len(too_long)}; raise the limit or set data.long_prompts=skip"
        )
    if not kept:
        left_out = f"; all {len(too_long)} are over data.max_prompt_tokens" if too_long else ""
        raise DataError(f"{section.prompts}: no prompts{left_out}")
    return Prompts(items=tuple(kept), skipped=len(too_long), shuffle=section.shuffle, thinking=section.thinking)


def _prompt(row: Row, index: int, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    messages, solution = _conversation(row, section)
    if section.solution_key is not None:
        solution = _text(row, section.solution_key, "solution_key")
    hints = {name: _hint(row, key, f"hint_keys.{name}") for name, key in section.hint_keys.items()}
    try:
        digest = hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()
        tokens = render(tokenizer, messages, thinking=section.thinking)
    except (DataError, UnicodeEncodeError) as error:
        raise DataError(f"{row.where}: {error}") from error
    return Prompt(
        id=f"{index}-{digest[:12]}",
        messages=tuple(messages),
        tokens=tokens,
        answer=_gold(row, section),
        hints=hints if solution is None else hints | {"solution": solution},
        source=Path(section.prompts).stem
        if section.source_key is None
        else _text(row, section.source_key, "source_key"),
    )


def _conversation(row: Row, section: DataSection) -> tuple[list[dict[str, str]], str | None]:
    """Messages up to the turn to be answered, and the answering turn where the data holds one."""
    if section.messages_key is None:
        messages = [{"role": "user", "content": _text(row, section.prompt_key, "prompt_key")}]
    else:
        messages = _messages(row, section.messages_key)
    solution = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] != "user":
        raise DataError(f"{row.where}: {section.messages_key!r} needs a user turn before the answer")
    if section.instruction is not None:
        messages[-1]["content"] += "\n" + section.instruction
    if section.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": section.system})
    return messages, solution


def _messages(row: Row, key: str, setting: str = "messages_key") -> list[dict[str, str]]:
    given = _value(row, key, setting)
    fits = isinstance(given, list) and all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in given
    )
    if not fits or not given:
        raise DataError(f"{row.where}: {key!r} must be a list of {{role, content}} texts, is {_short(given)}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in given]


def _hint(row: Row, key: str, setting: str) -> str:
    """A text, or the last of a column's chat messages."""
    if not isinstance(_value(row, key, setting), list):
        return _text(row, key, setting)
    return _messages(row, key, setting)[-1]["content"]


def _gold(row: Row, section: DataSection) -> str | None:
    if section.answer_key is None:
        return None
    given = _value(row, section.answer_key, "answer_key")
    if given is None:
        return None
    if section.answer_after is None:
        return _as_text(given)
    _, marker, after = str(given).rpartition(section.answer_after)
    if not marker:
        raise DataError(
            f"{row.where}: {section.answer_key!r} holds no {section.answer_after!r} (data.answer_after); "
            f"it ends in {_short(str(given)[-40:])}"
        )
    return THOUSANDS.sub("", after.strip())


def _as_text(value: Any) -> str:
    """Numbers without a needless `.0`; a list as its items with commas."""
    if isinstance(value, list):
        return ", ".join(_as_text(item) for item in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _text(row: Row, key: str, setting: str) -> str:
    value = _value(row, key, setting)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{row.where}: {key!r} must be a text that is not empty, is {_short(value)}")
    return value


def _value(row: Row, key: str, setting: str) -> Any:
    if key not in row.values:
        _refuse_key(row, key, setting)
    return row.values[key]


def _refuse_key(row: Row, key: str, setting: str) -> NoReturn:
    from difflib import get_close_matches

    near = get_close_matches(key, list(row.values), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    null = ", null when there is no gold answer" if setting == "answer_key" else ""
    raise DataError(
        f"{row.where}: no key {key!r} (data.{setting}{null}); there are {', '.join(row.values) or 'none'}{hint}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
