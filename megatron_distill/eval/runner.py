"""How many problems a model solves: avg@k and pass@k on held-out prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_distill.data.prompts import DataSection, Prompts
from megatron_distill.files import write_atomically
from megatron_distill.rollout.base import Sampling
from megatron_distill.rollout.sample import Tools, Wanted, sample
from megatron_distill.types import Metric, Scored, Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSection:
    """Section `eval`: what is asked, how often, and what is reported."""

    data: DataSection | None = None
    """Held-out prompts, with the keys of section `data`; null: no evaluation."""
    every: int = 0
    """Steps between two evaluations while training; 0 evaluates never."""
    samples: int = 1
    """Responses to each prompt: the k of avg@k."""
    pass_at: tuple[int, ...] = (1,)
    """The k of each pass@k that is reported; none above `samples`."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the tokens are drawn; temperature 0 takes the likeliest."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every={self.every}: must be 0 (never) or more")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: must be at least 1")
        if not all(1 <= k <= self.samples for k in self.pass_at):
            raise ValueError(f"pass_at={list(self.pass_at)}: each must be from 1 to samples={self.samples}")

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps."""
        return self.data is not None and self.every > 0 and step % self.every == 0


def evaluate(
    tools: Tools, prompts: Prompts, section: EvalSection, *, step: int, seed: int, folder: Path | None = None
) -> tuple[Metric, ...]:
    """Ask every prompt `section.samples` times with the engine's present weights; equal on all ranks.

    Draws depend on seed, prompt and sample, not on the step: two models are asked with the same random numbers.
    Rank 0 writes every response to `folder`/step_NNNNNN.jsonl.
    """
    wanted = [
        Wanted(
            prompt=prompt,
            group=prompt.id,
            sample=index,
            sampling=section.sampling,
            key=(seed, "eval", prompt.id, index),
        )
        for prompt in prompts
        for index in range(section.samples)
    ]
    scored = sample(tools, wanted)
    groups = [scored[first : first + section.samples] for first in range(0, len(scored), section.samples)]
    if folder is not None and tools.ranks.rank == 0:
        lines = (json.dumps(_record(one), ensure_ascii=False) + "\n" for one in scored)
        write_atomically(folder / f"step_{step:06d}.jsonl", lines)
    return summary(groups, section)


def summary(groups: Sequence[Sequence[Scored]], section: EvalSection) -> tuple[Metric, ...]:
    """Metrics of scored groups; what could not be scored counts neither as right nor as wrong."""
    every = [one for group in groups for one in group]
    rewards = [one.reward for one in every if one.reward is not None]
    metrics = [
        Metric(f"eval/avg_at_{section.samples}", math.fsum(rewards), len(rewards)),
        Metric("eval/length_mean", sum(len(one.rollout.tokens) for one in every), len(every)),
        Metric("eval/truncated", sum(one.rollout.stop is Stop.LENGTH for one in every), len(every)),
        Metric("eval/unscored", len(every) - len(rewards), len(every)),
    ]
    for k in section.pass_at:
        passed = [pass_at(len(tries), sum(tries), k) for tries in map(_tries, groups) if len(tries) >= k]
        metrics.append(Metric(f"eval/pass_at_{k}", math.fsum(passed), len(passed)))
    return tuple(metrics)


def pass_at(tries: int, right: int, k: int) -> float:
    """Chance that k of `tries` answers, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1), as a product that cannot overflow.
    """
    wrong = tries - right
    if wrong < k:
        return 1.0
    return 1.0 - math.prod((wrong - drawn) / (tries - drawn) for drawn in range(k))


def _tries(group: Sequence[Scored]) -> list[bool]:
    return [one.reward >= 1.0 for one in group if one.reward is not None]


def _record(one: Scored) -> dict[str, object]:
    rollout = one.rollout
    return {
        "prompt": rollout.prompt.id,
        "sample": rollout.sample,
        "reward": one.reward,
        "answer": rollout.prompt.answer,
        "question": rollout.prompt.messages[-1]["content"],
        "text": rollout.text,
        "tokens": len(rollout.tokens),
        "stop": rollout.stop.value,
        "facts": dict(one.facts),
    }
