"""Tokenizers and chat templates: text becomes ids here once, and ids travel from then on.

`transformers` is imported when a tokenizer is loaded, not before: reading a configuration needs none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_distill.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model folder; never downloads.

    A tokenizer.json is taken as it is written. `AutoTokenizer` would rebuild its pipeline by the family of the
    model that lies beside it, so that one file could cut text differently for student and teacher.

    Raises:
        ModelError: no such folder, no tokenizer in it, or one that needs code from the folder.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give a local folder with tokenizer.json")
    as_written = (folder / "tokenizer.json").is_file() and not trust_remote_code
    if not as_written and not (folder / "tokenizer_config.json").is_file():
        raise ModelError(f"{folder}: holds no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    try:
        if as_written:
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {reason}") from error


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
) -> tuple[int, ...]:
    """`messages` through the tokenizer's chat template, as ids.

    `thinking` is handed to templates that know the switch `enable_thinking`; None leaves it to the template.

    Raises:
        DataError: no template, or one that refuses these messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; put chat_template.jinja there")
    switches = {} if thinking is None else {"enable_thinking": thinking}
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
            **switches,
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        roles = ", ".join(message.get("role", "?") for message in messages)
        raise DataError(f"the chat template refuses messages with roles {roles}: {error}") from error
    return tuple(ids)


def stop_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's end of sequence and those of generation_config.json.

    Raises:
        ModelError: neither names one, or generation_config.json is broken.
    """
    found = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    generation = Path(folder) / "generation_config.json"
    if generation.is_file():
        found |= _named_ends(generation)
    if not found:
        raise _no_end(folder)
    return tuple(sorted(found))


def end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends what is written for the student to learn from.

    Raises:
        ModelError: the tokenizer names none.
    """
    if tokenizer.eos_token_id is None:
        raise _no_end(tokenizer.name_or_path)
    return tokenizer.eos_token_id


def _no_end(folder: str | Path) -> ModelError:
    return ModelError(f"{folder}: no end-of-sequence token; name eos_token in tokenizer_config.json")


def _named_ends(file: Path) -> set[int]:
    """`eos_token_id` of a generation_config.json: one id, several, or none."""
    try:
        settings = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON: {error}; copy it again, or take it away") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{file}: must hold one JSON object, holds a {type(settings).__name__}")
    named = settings.get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(one) is int for one in ids):
        raise ModelError(f"{file}: eos_token_id must be an id or a list of ids, is {named!r}")
    return set(ids)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers with the same token for every id and the same end of sequence."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def compare(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """Why a teacher cannot read the student's ids, in one line; None when it can."""
    if fingerprint(student) == fingerprint(teacher):
        return None
    where = f"tokenizers of student ({student.name_or_path}) and teacher ({teacher.name_or_path}) differ"
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    different = [index for index in sorted(ours.keys() | theirs.keys()) if ours.get(index) != theirs.get(index)]
    if not different:
        return (
            f"{where} in their end of sequence: {student.eos_token!r} and {teacher.eos_token!r}; "
            "name the same eos_token in both tokenizer_config.json"
        )
    first = ", ".join(f"id {index} is {ours.get(index)!r} and {theirs.get(index)!r}" for index in different[:3])
    return f"{where} in {len(different)} of {len(ours)} tokens: {first}; use a teacher with the student's tokenizer"
