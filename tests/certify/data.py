"""Sequences for objectives of every sort, and the whole step that an oracle sees of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megatron_distill.objectives.base import Scope
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop
from tests.oracles import dense

SEED, STEP = 5, 7
"""Of the run and of the step in it that is certified."""
SOURCES = ("math", "code")
"""Names of the data sources; `teacher_sources` in an oracle's FIELDS speak of them."""
NAN = float("nan")

type Logprobs = Callable[[Sequence[int], int], Tensor]
"""(tokens, length of the prompt) -> [response] the student's log-probs of the response, float64."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One sequence before it has tokens."""

    group: str
    prompt: int
    response: int
    reward: float = 0.0
    origin: str = "s"
    """`s`, `t` or `c` for each response token; the last letter goes on to the end."""
    stop: Stop = Stop.EOS
    shared: int = 0
    """Tokens at the beginning of the response that are those of the group's first one."""


def _group(name: str, prompt: int, responses: Sequence[int], rewards: Sequence[float], **common: Any) -> list[_Plan]:
    return [
        _Plan(group=name, prompt=prompt, response=response, reward=reward, **common)
        for response, reward in zip(responses, rewards, strict=True)
    ]


# Lengths are odd and unequal, so that no two ways of dividing by them agree; one response has a single token.
_SAMPLED = [
    *_group("a", 3, (5, 9, 2, 7), (1, 0, 0, 1)),
    *_group("b", 1, (1, 4, 6, 3), (0, 0, 0, 0)),
    *_group("c", 4, (8, 2, 5, 3), (0, 0, 1, 0)),
    *_group("d", 2, (4, 7), (1, 1)),
]
_CUT_OFF = (1, 6, 8)
"""Which of the sampled ones, all of reward 0, ended for want of room."""

PLANS: Mapping[str, list[_Plan]] = {
    "sampled": [replace(plan, stop=Stop.LENGTH) if place in _CUT_OFF else plan for place, plan in enumerate(_SAMPLED)],
    "single": _group("a", 3, (9,), (1,)),
    "pairs": [
        plan
        for name, prompt, responses in (("a", 3, (5, 9)), ("b", 1, (4, 1)), ("c", 4, (2, 6)), ("d", 2, (7, 3)))
        for plan in _group(name, prompt, responses, (1, 0), origin="c", shared=3 if name in "ac" else 0)
    ],
    "mixed_origins": [
        *_group("a", 3, (5, 9), (1, 0), origin="tts"),
        *_group("b", 1, (4, 1), (0, 0), origin="s"),
        *_group("c", 4, (6, 8), (0, 1), origin="tttts"),
        *_group("d", 2, (7, 3), (1, 0), origin="t"),
    ],
    "constructed_groups": [
        *_group("a", 3, (5, 9, 2, 7), (1, 0, 0, 1)),
        *_group("a/ref", 3, (6, 3), (1, 1), origin="c"),
        *_group("a/ref", 3, (8,), (0,), origin="c", stop=Stop.LENGTH),
        *_group("b", 1, (4, 1, 6), (0, 1, 0)),
        *_group("b", 1, (3,), (0,), stop=Stop.LENGTH),
        *_group("b/ref", 1, (5, 2), (1, 1), origin="c"),
        *_group("c", 4, (2, 5, 3, 4), (0, 0, 1, 0)),
        *_group("c/ref", 4, (7,), (1,), origin="c"),
        *_group("d", 2, (4, 7), (1, 1)),
    ],
    "revisions": [
        *_group("a", 3, (8, 9), (1, 1), origin="sssccs"),
        *_group("b", 1, (7, 4), (1, 1), origin="sccs"),
        *_group("c", 4, (6, 9), (1, 1), origin="sscs"),
        *_group("d", 2, (7,), (1,), origin="sssscs"),
    ],
}
_LETTERS = {"s": Origin.STUDENT, "t": Origin.TEACHER, "c": Origin.CONSTRUCTED}


def sequences(kind: str, vocabulary: int, logprobs: Logprobs) -> list[Scored]:
    """The step's data, in the order of (group, sample). The engine's log-probs are a little off the student's."""
    generator = torch.Generator().manual_seed(11)
    plans = PLANS[kind]
    found: list[Scored] = []
    prompts: dict[str, tuple[int, ...]] = {}
    members: dict[str, list[tuple[int, ...]]] = {}
    names = sorted({plan.group.split("/")[0] for plan in plans})
    for plan in plans:
        question = plan.group.split("/")[0]
        drawn = tuple(torch.randint(vocabulary, (plan.prompt + plan.response,), generator=generator).tolist())
        prompt = prompts.setdefault(question, drawn[: plan.prompt])
        group = members.setdefault(plan.group, [])
        shared = min(plan.shared, len(group[0]), plan.response) if group else 0
        response = (*group[0][:shared], *drawn[plan.prompt + shared :]) if shared else drawn[plan.prompt :]
        group.append(response)
        letters = plan.origin + plan.origin[-1] * plan.response
        origin = tuple(_LETTERS[letter] for letter in letters[: plan.response])
        noise = 0.1 * torch.randn(plan.response, generator=generator)
        # rounded to fp32, in which they travel, so that the oracle has the very same numbers
        engine = (logprobs((*prompt, *response), plan.prompt) + noise).clamp(max=-1e-3).float().tolist()
        known = [value if one == Origin.STUDENT else NAN for value, one in zip(engine, origin, strict=True)]
        rollout = Rollout(
            prompt=Prompt(
                id=question, messages=(), tokens=prompt, source=SOURCES[names.index(question) % len(SOURCES)]
            ),
            group=plan.group,
            sample=len(group) - 1,
            tokens=response,
            logprobs=tuple(known) if Origin.STUDENT in origin else None,
            origin=origin,
            stop=plan.stop,
            version=0,
        )
        found.append(Scored(rollout=rollout, reward=plan.reward))
    assert found == sorted(found, key=lambda one: (one.rollout.group, one.rollout.sample))
    return found


def draws(scored: Sequence[Scored]) -> Callable[[str, int], Tensor]:
    """What `dense.Step.uniform` promises."""
    scope = Scope(seed=SEED, step=STEP)
    return lambda name, sequence: scope.uniform(len(scored[sequence].rollout.tokens), name, sequence)


def whole_step(
    scored: Sequence[Scored], student_RV: Tensor, teachers_RV: Mapping[str, Tensor], state: Mapping[str, float]
) -> dense.Step:
    """The oracle's view: rows of all sequences, one sequence after another."""
    rollouts = [one.rollout for one in scored]
    groups = tuple(sorted({rollout.group for rollout in rollouts}))
    return dense.Step(
        student_RV=student_RV,
        teachers_RV={name: logits_RV.detach() for name, logits_RV in teachers_RV.items()},
        target_R=torch.tensor([token for rollout in rollouts for token in rollout.tokens]),
        sequence_R=torch.tensor([place for place, rollout in enumerate(rollouts) for _ in rollout.tokens]),
        origin_R=torch.tensor([int(origin) for rollout in rollouts for origin in rollout.origin]),
        rollout_logp_R=torch.tensor(
            [value for rollout in rollouts for value in rollout.logprobs or [NAN] * len(rollout.tokens)],
            dtype=torch.float64,
        ),
        reward_S=torch.tensor([one.reward for one in scored], dtype=torch.float64),
        group_S=torch.tensor([groups.index(rollout.group) for rollout in rollouts]),
        group_names=groups,
        sample_S=torch.tensor([rollout.sample for rollout in rollouts]),
        stopped_S=torch.tensor([rollout.stop == Stop.EOS for rollout in rollouts]),
        source_S=tuple(rollout.prompt.source for rollout in rollouts),
        uniform=draws(scored),
        number=STEP,
        state=state,
    )


def total_rows(kind: str) -> int:
    """Response tokens of the step."""
    return list(accumulate(plan.response for plan in PLANS[kind]))[-1]
