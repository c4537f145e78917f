"""The data's worked solution as a response that nobody sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_distill.errors import DataError
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_solutions(prompts: list[Prompt]) -> None:
    """Before the run starts.

    Raises:
        DataError: a prompt has no worked solution.
    """
    without = [prompt.id for prompt in prompts if "solution" not in prompt.hints]
    if without:
        raise DataError(
            f"{len(without)} of {len(prompts)} prompts have no worked solution, the first is {without[0]}; "
            "demonstrations need data.solution_key, or a last assistant turn in data.messages_key"
        )


def demonstrate(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, group: str, version: int, max_tokens: int
) -> Scored:
    """The solution and an end of sequence; one over `max_tokens` is cut and has none, as a cut rollout has none."""
    text = prompt.hints["solution"]
    tokens = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    whole = len(tokens) <= max_tokens
    tokens = tokens[:max_tokens]
    return Scored(
        rollout=Rollout(
            prompt=prompt,
            group=group,
            sample=0,
            tokens=tokens,
            logprobs=None,
            origin=(Origin.CONSTRUCTED,) * len(tokens),
            stop=Stop.EOS if whole else Stop.LENGTH,
            version=version,
            text=text,
        ),
        reward=None,
    )
