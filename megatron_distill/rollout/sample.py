"""The plain workflow: write responses, score them, share them with all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_distill.errors import DataError
from megatron_distill.rewards.base import Judge, Verdict, Verifier
from megatron_distill.rollout.base import Completion, Key, Request, RolloutEngine, Sampling
from megatron_distill.types import Origin, Prompt, Rollout, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Ranks(Protocol):
    """What sharing work over processes needs of a mesh."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def gather_objects[T](self, value: T) -> list[T]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What a workflow works with."""

    engine: RolloutEngine
    judge: Judge
    tokenizer: PreTrainedTokenizerBase
    ranks: Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One response to be written."""

    prompt: Prompt
    group: str
    sample: int
    sampling: Sampling
    """`max_new_tokens` bounds what the student writes, after `start`."""
    key: Key
    start: tuple[int, ...] = ()
    """How the response begins; the student goes on from there."""
    start_origin: Origin = Origin.TEACHER
    """Who wrote `start`."""


def check_answers(verifier: Verifier, prompts: Sequence[Prompt]) -> None:
    """Before the run starts.

    Raises:
        DataError: the verifier compares with a gold answer that a prompt does not have.
    """
    without = [prompt.id for prompt in prompts if prompt.answer is None]
    if verifier.needs_answers and without:
        raise DataError(
            f"{len(without)} of {len(prompts)} prompts have no gold answer, the first is {without[0]}; "
            "set data.answer_key, or reward.kind=none"
        )


def sample(tools: Tools, wanted: Sequence[Wanted]) -> list[Scored]:
    """All wanted responses, in order, equal on all ranks; each rank writes and scores a share of them.

    The embedded engine lives on every rank. What is exchanged are token ids and verdicts, never prompts.
    """
    rank, world = tools.ranks.rank, tools.ranks.world
    mine = wanted[len(wanted) * rank // world : len(wanted) * (rank + 1) // world]
    completions = tools.engine.generate(
        [Request(tokens=one.prompt.tokens + one.start, sampling=one.sampling, key=one.key) for one in mine]
    )
    texts = [
        tools.tokenizer.decode(one.start + done.tokens, skip_special_tokens=True)
        for one, done in zip(mine, completions, strict=True)
    ]
    verdicts = tools.judge.score([(one.prompt.answer, text) for one, text in zip(mine, texts, strict=True)])
    shares = tools.ranks.gather_objects(list(zip(completions, texts, verdicts, strict=True)))
    written = [response for share in shares for response in share]
    return [_scored(one, *response) for one, response in zip(wanted, written, strict=True)]


def _scored(wanted: Wanted, done: Completion, text: str, verdict: Verdict) -> Scored:
    return Scored(
        rollout=Rollout(
            prompt=wanted.prompt,
            group=wanted.group,
            sample=wanted.sample,
            tokens=wanted.start + done.tokens,
            logprobs=(float("nan"),) * len(wanted.start) + done.logprobs,
            origin=(wanted.start_origin,) * len(wanted.start) + (Origin.STUDENT,) * len(done.tokens),
            stop=done.stop,
            version=done.version,
            text=text,
        ),
        reward=verdict.reward,
        facts=verdict.facts,
    )
