"""What a step's rollouts looked like, as metrics: the first place to look when a run is odd."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_distill.rollout.base import RolloutEngine
from megatron_distill.types import Counts, Metric, Origin, Rollout, Scored, StepReport, Stop


def describe_rollouts(scored: Sequence[Scored], step: int) -> list[Metric]:
    """Lengths, truncation, rewards and staleness of a whole step; `step` is the version that trains on them."""
    rollouts = [one.rollout for one in scored]
    metrics = [
        Metric("rollout/length_mean", sum(len(one.tokens) for one in rollouts), len(rollouts)),
        Metric("rollout/truncated", sum(one.stop is Stop.LENGTH for one in rollouts), len(rollouts)),
        *describe_staleness(rollouts, step),
    ]
    rewards = [one.reward for one in scored if one.reward is not None]
    if rewards:
        groups: dict[str, list[float]] = {}
        for one in scored:
            if one.reward is not None:
                groups.setdefault(one.rollout.group, []).append(one.reward)
        mixed = sum(len(set(group)) > 1 for group in groups.values())
        metrics += [
            Metric("reward/mean", math.fsum(rewards), len(rewards)),
            Metric("reward/mixed_groups", mixed, len(groups)),
            Metric("reward/unscored", len(scored) - len(rewards), len(scored)),
        ]
        # failures are longer than successes: how much so says whether a reduction favours either
        for name, right in (("right", True), ("wrong", False)):
            lengths = [
                len(one.rollout.tokens) for one in scored if one.reward is not None and (one.reward > 0) == right
            ]
            if lengths:
                metrics.append(Metric(f"rollout/length_{name}", sum(lengths), len(lengths)))
    for fact in sorted({name for one in scored for name in one.facts}):
        values = [one.facts[fact] for one in scored if fact in one.facts]
        metrics.append(Metric(fact, math.fsum(values), len(values)))
    return metrics


def describe_staleness(rollouts: Sequence[Rollout], step: int) -> list[Metric]:
    """By how many updates the weights that sampled the student's tokens were behind: on average, and at most."""
    ages = [
        step - version
        for one in rollouts
        for version, origin in zip(one.versions, one.origin, strict=True)
        if origin is Origin.STUDENT
    ]
    if not ages:
        return []
    return [
        Metric("rollout/staleness_mean", sum(ages), len(ages)),
        Metric("rollout/staleness_max", max(ages)),
    ]


def describe_cuts(scored: Sequence[Scored], fitting: Sequence[Scored]) -> list[Metric]:
    """How many rollouts were cut, or left out, because a teacher could not read them whole; nothing if none could be.

    Args:
        scored: as they were written.
        fitting: what is trained on; the same list where no teacher reads more than the student.
    """
    if fitting is scored:
        return []
    written = {(one.rollout.group, one.rollout.sample): len(one.rollout.tokens) for one in scored}
    whole = sum(written[one.rollout.group, one.rollout.sample] == len(one.rollout.tokens) for one in fitting)
    return [Metric("rollout/cut_for_teachers", len(scored) - whole, len(scored))]


def describe_engine(engine: RolloutEngine | None) -> list[Metric]:
    """What the engine has to tell of itself; only the first rank may know."""
    return [] if engine is None else [Metric(f"engine/{name}", value) for name, value in engine.figures.items()]


def describe_step(counts: Counts, report: StepReport, peak_gib: float) -> list[Metric]:
    """Sizes, loss and optimizer of a step."""
    return [
        Metric("loss/total", report.loss),
        *report.metrics,
        Metric("optim/grad_norm", report.grad_norm),
        Metric("optim/lr", report.lr),
        Metric("optim/skipped", float(report.skipped)),
        Metric("batch/tokens", counts.tokens),
        Metric("batch/sequences", counts.sequences),
        Metric("memory/peak_gib", peak_gib),
    ]
