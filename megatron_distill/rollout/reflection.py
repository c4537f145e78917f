"""TAPO's micro-reflective trajectories: the words that ask for one, and what makes an answer one.

The student reads a problem, its own wrong attempt and a right one, and rebuilds the wrong attempt: the same beginning
up to the error, a sentence that notices it, the correction. What it writes is checked here, and becomes token ids: the
attempt's own ids as far as the texts agree, the rest cut anew, so that the copied part keeps the ids it was sampled
with. Nothing here decides whether the rebuilt answer is right; wrong ones count too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING

from megatron_distill.data.templates import end_of_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = """\
Below are a problem, an attempt at it that is wrong, and a solution that is right.

Problem:
{problem}

Wrong attempt:
{wrong}

Right solution:
{right}

First write, between <analysis> and </analysis>, where the wrong attempt makes its first decisive error, and why it is \
one.
Then write, between <reconstruction> and </reconstruction>, an answer to the problem that starts with the wrong \
attempt, word for word, up to and including that error, then notices the error in a sentence or two as somebody would \
who sees it while working, and from there goes on to the right final answer. It must read as one train of thought: \
nothing in it may mention that an attempt or a solution was given."""
"""Our own words: the paper's are not published."""

LEAKS = (
    "reference solution",
    "correct solution provided",
    "right solution provided",
    "provided solution",
    "the wrong attempt",
    "the student",
    "<analysis",
)
"""What is new in a reconstruction and says one of these, as whole words, tells of texts that a reader of the problem
does not have. Narrow on purpose: "so the correct solution is 8" tells of none."""

PERIODS, REPEATS = (10, 1500), 3
"""A text that ends in the same 10 to 1500 characters three times over has run into a loop."""


FAILURES = ("no_room", "unparsed", "leaks", "loops", "not_copied", "nothing_new", "too_long")
"""Why there is no trajectory, in the order in which it is checked; `no_room`: request and reply would have been longer
than the model's positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What a reconstruction must pass to be kept."""

    copied_tokens: int = 32
    """Least tokens that it shares with the beginning of the wrong attempt."""
    copied_fraction: float = 0.1
    """Least share of the wrong attempt that it so repeats; the larger of the two bounds holds."""
    new_tokens: int = 16
    """Least tokens after that."""
    refuse_leaks: bool = True
    """Drop it if what follows the copied part speaks of the texts it was made from, in words that the attempt itself
    does not use (a problem may be about a student)."""
    refuse_loops: bool = True
    """Drop it if it ends in a loop."""

    def __post_init__(self) -> None:
        if self.copied_tokens < 0 or self.new_tokens < 1 or not 0 <= self.copied_fraction <= 1:
            raise ValueError("copied_tokens must be 0 or more, new_tokens 1 or more, copied_fraction from 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """A kept one."""

    tokens: tuple[int, ...]
    """With the end of sequence."""
    copied: int
    """How many of them are the wrong attempt's own."""
    text: str


def reconstruct(
    tokenizer: PreTrainedTokenizerBase, reply: str, attempt: tuple[int, ...], most_tokens: int, checks: Checks
) -> Reconstruction | str:
    """The trajectory in `reply`, or which of `FAILURES` it is."""
    text = _between("reconstruction", reply)
    if text is None or _between("analysis", reply) is None:
        return "unparsed"
    written = attempt[:-1] if attempt[-1] == end_of_sequence(tokenizer) else attempt
    wrong = tokenizer.decode(written, skip_special_tokens=True)
    # the space within the tags is theirs, and took that of the attempt's beginning with it
    text = wrong[: len(wrong) - len(wrong.lstrip())] + text
    copied = copied_tokens(tokenizer, text, written)
    rest = text[len(tokenizer.decode(attempt[:copied], skip_special_tokens=True)) :]
    if checks.refuse_leaks and leaks(rest, wrong):
        return "leaks"
    if checks.refuse_loops and loops(text):
        return "loops"
    new = tuple(tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"])
    if copied < max(checks.copied_tokens, checks.copied_fraction * len(attempt)):
        return "not_copied"
    if len(new) < checks.new_tokens:
        return "nothing_new"
    tokens = (*attempt[:copied], *new, end_of_sequence(tokenizer))
    return Reconstruction(tokens=tokens, copied=copied, text=text) if len(tokens) <= most_tokens else "too_long"


def copied_tokens(tokenizer: PreTrainedTokenizerBase, text: str, attempt: tuple[int, ...]) -> int:
    """How many of the attempt's first ids spell the beginning of `text`."""
    shared = len(commonprefix([text, tokenizer.decode(attempt, skip_special_tokens=True)]))
    fits, too_many = 0, len(attempt) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        # the text of more ids is never shorter, so that halving finds the last that fits
        if len(tokenizer.decode(attempt[:middle], skip_special_tokens=True)) <= shared:
            fits = middle
        else:
            too_many = middle
    while fits and not text.startswith(tokenizer.decode(attempt[:fits], skip_special_tokens=True)):
        fits -= 1  # ids that end within a character spell something else until the next one comes
    return fits


def leaks(new: str, attempt: str) -> bool:
    """Whether `new` speaks of what only the one who rebuilds the attempt was shown."""
    return any(_says(new, leak) and not _says(attempt, leak) for leak in LEAKS)


def _says(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


def loops(text: str) -> bool:
    """Whether `text` ends in the same piece three times over."""
    shortest, longest = PERIODS
    longest = min(longest, len(text) // REPEATS)
    return any(text.endswith(text[-period:] * REPEATS) for period in range(shortest, longest + 1))


def _between(tag: str, reply: str) -> str | None:
    """What stands between the one opening and the one closing tag; None if there are others, or nothing."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", reply, re.DOTALL)
    if len(found) != 1 or reply.count(f"<{tag}>") != 1 or reply.count(f"</{tag}>") != 1:
        return None
    return found[0].strip() or None
