"""Pairs of the data: a chosen and a rejected response to each prompt, for REDI, DPO and SimPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_distill.errors import DataError
from megatron_distill.rollout.demonstrate import demonstrate, text_lengths
from megatron_distill.rollout.sources.base import FromData, SourcePart, Surroundings
from megatron_distill.types import Origin, Prompt, Scored, Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SKIPPED = "rollout/pairs_skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs(SourcePart):
    """Two responses per prompt, from the data: sample 0 with reward 1, sample 1 with reward 0."""

    gives_logprobs: ClassVar[bool] = False
    gives_pairs: ClassVar[bool | None] = True

    chosen: str = "chosen"
    """Hint with the better response, by its name in `data.hint_keys`; `solution` is that of `data.solution_key`."""
    rejected: str = "rejected"
    """Hint with the worse response."""
    max_response_tokens: int = 4096
    """Longest response, end of sequence included; none is ever cut."""
    long_pairs: Literal["refuse", "skip"] = "refuse"
    """What to do about a pair with a longer one; skipped pairs are replaced by the next, and counted."""

    def __post_init__(self) -> None:
        if self.max_response_tokens < 1:
            raise ValueError(f"max_response_tokens={self.max_response_tokens}: must be at least 1")
        if self.chosen == self.rejected:
            raise ValueError(f"rejected={self.rejected}: must be another hint than chosen={self.chosen}")

    @property
    def origins(self) -> frozenset[Origin]:
        """Nobody sampled them."""
        return frozenset({Origin.CONSTRUCTED})

    def connect(self, surroundings: Surroundings) -> Pairing:
        """The live source.

        Raises:
            DataError: a prompt lacks one of the responses.
        """
        check_pairs(self, surroundings.prompts.items)
        return Pairing(self, surroundings)


def check_pairs(part: Pairs, prompts: Sequence[Prompt]) -> None:
    """Before the run starts.

    Raises:
        DataError: a prompt lacks one of the responses.
    """
    for name in (part.chosen, part.rejected):
        without = [prompt.id for prompt in prompts if name not in prompt.hints]
        if without:
            raise DataError(
                f"{len(without)} of {len(prompts)} prompts have no {name!r} response, the first is {without[0]}; "
                f"name its column: data.hint_keys.{name}=COLUMN"
            )


def check_pair_lengths(part: Pairs, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> None:
    """Before the run starts, where long pairs are refused; cuts every response into ids.

    Raises:
        DataError: a response is over the limit.
    """
    both = zip(*(text_lengths(tokenizer, prompts, name) for name in (part.chosen, part.rejected)), strict=True)
    longest = [max(lengths) for lengths in both]
    over = [index for index, length in enumerate(longest) if length > part.max_response_tokens]
    if over:
        raise _too_long(part, prompts[over[0]], longest[over[0]], f", the first of {len(over)} pairs over it")


def _too_long(part: Pairs, prompt: Prompt, length: int, more: str = "") -> DataError:
    return DataError(
        f"rollout.max_response_tokens={part.max_response_tokens}: prompt {prompt.id} has a response of {length} "
        f"tokens{more}; raise the limit or set rollout.long_pairs=skip"
    )


class Pairing(FromData):
    """The live source."""

    def __init__(self, part: Pairs, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self._part = part

    def next(self, step: int) -> list[Scored]:
        """`prompts_per_step` pairs, chosen before rejected.

        Raises:
            DataError: a response is over the limit and refused, or those of all prompts are.
        """
        pairs: list[Scored] = []
        skipped = 0
        while len(pairs) < 2 * self._run.prompts_per_step:
            ((group, prompt),) = self.take(1)
            pair = [self._response(group, prompt, sample) for sample in range(2)]
            if all(one.rollout.stop is Stop.EOS for one in pair):
                pairs += pair
                continue
            skipped += 1
            if self._part.long_pairs == "refuse":
                longest = max(
                    text_lengths(self._run.tokenizer, [prompt], name)[0]
                    for name in (self._part.chosen, self._part.rejected)
                )
                raise _too_long(self._part, prompt, longest)
            if skipped == len(self._run.prompts) and not pairs:
                raise DataError(
                    f"rollout.max_response_tokens={self._part.max_response_tokens}: no pair of the data is within it"
                )
        return [replace(pairs[0], facts={SKIPPED: float(skipped)}), *pairs[1:]]

    def _response(self, group: str, prompt: Prompt, sample: int) -> Scored:
        return demonstrate(
            self._run.tokenizer,
            prompt,
            group=group,
            version=self._version,
            max_tokens=self._part.max_response_tokens,
            hint=(self._part.chosen, self._part.rejected)[sample],
            sample=sample,
            reward=1.0 - sample,
        )
