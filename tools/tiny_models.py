"""A tiny student and a tiny teacher with a tokenizer trained on your data: to try a run before any real model is there.

    python -m tools.tiny_models gsm8k/train.jsonl models/gsm8k

Both are Qwen3 models of random weights, about a second of work per step on a laptop: they show that data, layout and
settings fit, and their answers mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_distill.data.rows import read_rows
from megatron_distill.errors import ConfigError, DataError, DistillError, ModelError

MODELS: dict[str, dict[str, Any]] = {
    "student": {"hidden": 64, "layers": 2, "heads": 4, "tied": True, "seed": 1},
    "teacher": {"hidden": 128, "layers": 4, "heads": 8, "tied": False, "seed": 2},
}
"""Sizes that 2 or 4 tensor-parallel and 2 pipeline stages divide."""
SMALLEST = 259
"""Smallest vocabulary: every byte, and three special tokens."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Write OUT/student and OUT/teacher; the exit code: 0 done, 2 something to put right."""
    try:
        chosen = _parser().parse_args(argv)
        write_models(chosen.data, chosen.out, chosen.vocab_size)
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_models(data: Path, out: Path, vocab_size: int) -> None:
    """Model folders with the same tokenizer, trained on every text in `data`.

    Raises:
        DataError: the data cannot be read, or hold no text.
        ModelError: a folder is there already.
    """
    for name in MODELS:
        if (out / name).exists():
            raise ModelError(f"{out / name}: is there already; name another OUT, or remove it")
    texts = list(_texts(data))
    if not texts:
        raise DataError(f"{data}: no texts to train a tokenizer on")

    from transformers.utils import logging

    from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer

    logging.disable_progress_bar()
    for name, sizes in MODELS.items():
        folder = tiny_model(out / name, "qwen3", vocab_size=vocab_size, kv_heads=4, **sizes)
        tiny_tokenizer(folder, texts, vocab_size=vocab_size)
        print(f"{folder}: qwen3, {sizes['layers']} layers, hidden size {sizes['hidden']}, vocabulary {vocab_size}")


def _texts(data: Path) -> Iterator[str]:
    for row in read_rows(data):
        yield from (value for value in row.values.values() if isinstance(value, str))


def _parser() -> Parser:
    parser = Parser(prog="python -m tools.tiny_models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="JSONL or parquet whose texts teach the tokenizer")
    parser.add_argument("out", type=Path, metavar="OUT", help="student/ and teacher/ are written here")
    parser.add_argument("--vocab-size", type=_vocab_size, default=1024, help="ids of the tokenizer (default 1024)")
    return parser


def _vocab_size(text: str) -> int:
    if not text.isdecimal() or int(text) < SMALLEST:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number from {SMALLEST} on")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
