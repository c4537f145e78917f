"""The plain workflow: write responses, score them, share them with all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from megatron_distill.errors import DataError, EngineError
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
class Start:
    """The beginning of a response that is there already."""

    tokens: tuple[int, ...] = ()
    origin: tuple[Origin, ...] = ()
    logprobs: tuple[float, ...] = ()
    """NaN where nobody sampled the token."""
    versions: tuple[int | None, ...] = ()
    """Of the weights that sampled each token; None where nobody did."""

    @staticmethod
    def by(origin: Origin, tokens: tuple[int, ...]) -> Start:
        """Tokens that the student did not sample."""
        count = len(tokens)
        return Start(
            tokens=tokens, origin=(origin,) * count, logprobs=(float("nan"),) * count, versions=(None,) * count
        )

    def __add__(self, other: Start) -> Start:
        return Start(
            tokens=self.tokens + other.tokens,
            origin=self.origin + other.origin,
            logprobs=self.logprobs + other.logprobs,
            versions=self.versions + other.versions,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One response to be written."""

    prompt: Prompt
    group: str
    sample: int
    sampling: Sampling
    """`max_new_tokens` bounds what the student writes, after `start`."""
    key: Key
    start: Start = field(default_factory=Start)
    """How the response begins; the student goes on from there."""
    judge_start: bool = True
    """Whether the verifier reads `start` too, or only what the student then writes."""


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
    """All wanted responses, in order, equal on all ranks; each rank scores a share of them."""
    requests = [
        Request(tokens=one.prompt.tokens + one.start.tokens, sampling=one.sampling, key=one.key) for one in wanted
    ]
    written = list(zip(wanted, complete(tools, requests), strict=True))
    judged = shared(tools.ranks, written, lambda mine: _judged(tools, mine))
    return [_scored(*one, *verdict) for one, verdict in zip(written, judged, strict=True)]


def complete(tools: Tools, requests: Sequence[Request]) -> list[Completion]:
    """One completion per request, in order, equal on all ranks, wherever the engine lives."""
    if tools.engine.everywhere:
        return shared(tools.ranks, requests, tools.engine.generate)
    return tools.engine.generate(requests)


def shared[Item, Result](
    ranks: Ranks, items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]
) -> list[Result]:
    """`work` on all items, a share on each rank; all results, in order, on every rank."""
    mine = items[len(items) * ranks.rank // ranks.world : len(items) * (ranks.rank + 1) // ranks.world]
    return [result for share in ranks.gather_objects(work(mine)) for result in share]


def on_first_rank[Found](ranks: Ranks, work: Callable[[], Found]) -> Found:
    """What `work` gives on the first rank, on every rank; collective. Results are picklable.

    Raises:
        EngineError: on every rank, if `work` raised it.
    """
    outcome: Found | EngineError | None = None
    if ranks.rank == 0:
        try:
            outcome = work()
        except EngineError as error:
            outcome = error
    shared = ranks.gather_objects(outcome)[0]
    if isinstance(shared, EngineError):
        raise shared
    return shared  # type: ignore[return-value]


def _judged(tools: Tools, written: Sequence[tuple[Wanted, Completion]]) -> list[tuple[str, Verdict]]:
    texts = [
        tools.tokenizer.decode(
            one.start.tokens + done.tokens if one.judge_start else done.tokens, skip_special_tokens=True
        )
        for one, done in written
    ]
    verdicts = tools.judge.score([(one.prompt.answer, text) for (one, _), text in zip(written, texts, strict=True)])
    return list(zip(texts, verdicts, strict=True))


def _scored(wanted: Wanted, done: Completion, text: str, verdict: Verdict) -> Scored:
    versions = (*wanted.start.versions, *done.versions)
    oldest = min((one for one in versions if one is not None), default=done.version)
    return Scored(
        rollout=Rollout(
            prompt=wanted.prompt,
            group=wanted.group,
            sample=wanted.sample,
            tokens=wanted.start.tokens + done.tokens,
            logprobs=wanted.start.logprobs + done.logprobs,
            temperature=wanted.sampling.logprob_temperature,
            origin=wanted.start.origin + (Origin.STUDENT,) * len(done.tokens),
            stop=done.stop,
            version=oldest,
            versions=tuple(oldest if one is None else one for one in versions),
            text=text,
        ),
        reward=verdict.reward,
        facts=verdict.facts,
    )
