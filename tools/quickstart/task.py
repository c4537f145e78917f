"""Makes the quickstart's task: long addition with worked steps, its tokenizer, and two untrained model folders.

What it writes is what any user brings: JSONL files in GSM8K's form (`question`, `answer` ending in `#### N`) and
Hugging Face folders. Nothing later knows that they were made here.

    What is 478+356?        8+6+0=14
                            7+5+1=13
                            4+3+1=8
                            #### 834
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DIGITS = 3
TRAIN_PROBLEMS = 4000
HELD_OUT_PROBLEMS = 500
TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Two numbers to add, each of `DIGITS` digits."""

    left: int
    right: int

    @property
    def question(self) -> str:
        """What the user asks."""
        return f"What is {self.left}+{self.right}?"

    @property
    def answer(self) -> str:
        """Column by column from the right, `digit+digit+carry=sum`; then the number after `####`."""
        lines = []
        carry = 0
        for column in range(DIGITS):
            left, right = (number // 10**column % 10 for number in (self.left, self.right))
            lines.append(f"{left}+{right}+{carry}={left + right + carry}")
            carry = (left + right + carry) // 10
        return "\n".join([*lines, f"#### {self.left + self.right}"])


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a small Qwen3 model; heads are a multiple of two, so that two processes can share it."""

    hidden: int
    layers: int
    tied: bool
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32


TEACHER = Shape(hidden=128, layers=4, tied=False)
STUDENT = Shape(hidden=96, layers=2, tied=True)


def problems(count: int, seed: int) -> list[Problem]:
    """`count` different problems; `b+a` counts as `a+b`, so that a held-out sum is never seen the other way round."""
    draw = random.Random(seed)
    low, high = 10 ** (DIGITS - 1), 10**DIGITS - 1
    found: dict[tuple[int, int], Problem] = {}
    while len(found) < count:
        left, right = draw.randint(low, high), draw.randint(low, high)
        found.setdefault((min(left, right), max(left, right)), Problem(left, right))
    return list(found.values())


def write_problems(path: Path, chosen: Iterable[Problem]) -> None:
    """One JSON object per line."""
    with path.open("w", encoding="utf-8") as lines:
        for problem in chosen:
            lines.write(json.dumps({"question": problem.question, "answer": problem.answer}) + "\n")


def write_tokenizer(folder: Path, texts: Iterable[str]) -> int:
    """A tokenizer of printable ASCII whose words are learned from `texts`; returns the size of its vocabulary.

    Only letters merge: a digit or a sign is always a token of its own, which is what makes addition easy to learn.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Za-z]+|[^A-Za-z]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=128,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=["\n", *sorted(set(string.printable) - set(string.whitespace) | {" "})],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return len(fast)


def write_model(folder: Path, shape: Shape, vocab_size: int, seed: int) -> None:
    """config.json and safetensors of an untrained Qwen3 model."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=256,
        initializer_range=0.04,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    # transformers makes the padding row zero; a model that samples that token would get a gradient of hundreds
    torch.nn.init.normal_(model.get_input_embeddings().weight.data[config.pad_token_id], std=config.initializer_range)
    model.save_pretrained(folder)


def make(folder: Path, seed: int) -> None:
    """Everything the configs in configs/quickstart name: `task/` and `models/` under `folder`."""
    task = folder / "task"
    task.mkdir(parents=True, exist_ok=True)
    chosen = problems(TRAIN_PROBLEMS + HELD_OUT_PROBLEMS, seed)
    write_problems(task / TRAIN, chosen[:TRAIN_PROBLEMS])
    write_problems(task / HELD_OUT, chosen[TRAIN_PROBLEMS:])
    texts = ["system user assistant", *(f"{one.question}\n{one.answer}" for one in chosen[:TRAIN_PROBLEMS])]
    for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
        model = folder / "models" / name
        vocab_size = write_tokenizer(model, texts)
        write_model(model, shape, vocab_size, seed)
        print(f"{model}: untrained Qwen3, {shape.layers} layers of {shape.hidden}, vocabulary of {vocab_size}")
    print(f"{task}: {TRAIN_PROBLEMS} problems to train on, {HELD_OUT_PROBLEMS} held out")


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m tools.quickstart.task FOLDER [--seed N]`"""
    parser = argparse.ArgumentParser(description="make the quickstart's data, tokenizer and untrained models")
    parser.add_argument("folder", type=Path, help="where to write task/ and models/")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other problems and other weights")
    given = parser.parse_args(arguments)
    make(given.folder, given.seed)


if __name__ == "__main__":
    main()
