"""A text of the data as a response that nobody sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_distill.data.templates import end_of_sequence
from megatron_distill.errors import DataError
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOLUTION = "solution"
"""The hint that holds the worked solution."""


def check_solutions(prompts: list[Prompt]) -> None:
    """Before the run starts.

    Raises:
        DataError: a prompt has no worked solution.
    """
    without = [prompt.id for prompt in prompts if SOLUTION not in prompt.hints]
    if without:
        raise DataError(
            f"{len(without)} of {len(prompts)} prompts have no worked solution, the first is {without[0]}; "
            "demonstrations need data.solution_key, or a last assistant turn in data.messages_key"
        )


def solution_lengths(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_tokens: int) -> list[int]:
    """How many tokens `demonstrate` would make of each prompt's solution."""
    return [min(length, max_tokens) for length in text_lengths(tokenizer, prompts, SOLUTION)]


def text_lengths(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], hint: str) -> list[int]:
    """How many tokens, end of sequence included, each prompt's text of that name has."""
    texts = [prompt.hints[hint] for prompt in prompts]
    cut = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [len(tokens) + 1 for tokens in cut]


def demonstrate(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    group: str,
    version: int,
    max_tokens: int,
    hint: str = SOLUTION,
    sample: int = 0,
    reward: float | None = None,
) -> Scored:
    """The hint's text and an end of sequence; one over `max_tokens` is cut and has none, as a cut rollout has none."""
    text = prompt.hints[hint]
    tokens = (*tokenizer(text, add_special_tokens=False)["input_ids"], end_of_sequence(tokenizer))
    whole = len(tokens) <= max_tokens
    tokens = tokens[:max_tokens]
    return Scored(
        rollout=Rollout(
            prompt=prompt,
            group=group,
            sample=sample,
            tokens=tokens,
            logprobs=None,
            origin=(Origin.CONSTRUCTED,) * len(tokens),
            stop=Stop.EOS if whole else Stop.LENGTH,
            version=version,
            text=text,
        ),
        reward=reward,
    )
