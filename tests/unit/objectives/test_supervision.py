"""How several teachers share the work, and how much of one is compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_distill.data.packing import pack
from megatron_distill.errors import ConfigError
from megatron_distill.objectives._supervision import Supervised, teacher_shares
from megatron_distill.objectives.gkd import GKD
from megatron_distill.types import Batch, Fidelity, Origin, Prompt, Rollout, Scored, Stop, Token, TokenStats

BIG, SMALL = Token(logp_R=torch.tensor([-1.0, -2.0, -3.0])), Token(logp_R=torch.tensor([-5.0, -6.0, float("-inf")]))


def _batch(*sources: str) -> Batch:
    """A response of one token from each source."""
    scored = [
        Scored(
            rollout=Rollout(
                prompt=Prompt(id=str(index), messages=(), tokens=(1,), source=source),
                group=str(index),
                sample=0,
                tokens=(2,),
                logprobs=None,
                origin=(Origin.STUDENT,),
                stop=Stop.EOS,
                version=0,
            ),
            reward=None,
        )
        for index, source in enumerate(sources)
    ]
    return pack(scored, dp_rank=0, dp_size=1, tokens_per_micro_batch=100, device=torch.device("cpu"), version=0)


def test_teachers_share_equally_or_as_told() -> None:
    signals = {"big": BIG, "small": SMALL}
    assert teacher_shares(signals, {}) == {"big": 0.5, "small": 0.5}
    assert teacher_shares(signals, {"small": 1.0, "big": 3.0}) == {"big": 0.75, "small": 0.25}
    with pytest.raises(ConfigError, match=r"names \['big'\], the teachers are \['big', 'small'\]"):
        teacher_shares(signals, {"big": 1.0})


def test_by_source_each_token_has_one_teacher_and_the_other_counts_nothing_even_if_infinite() -> None:
    objective = GKD(teacher_sources={"math": "big", "code": "small", "proofs": "big"})
    batch = _batch("math", "code", "proofs")
    weights = {name: share for name, (share,) in objective.teacher_plan(batch).items()}
    blended = objective.blend({"big": BIG, "small": SMALL}, weights, lambda signal: signal.logp_R)
    assert blended.tolist() == [-1.0, -6.0, -3.0]
    stats = TokenStats(teacher_logp={"big": (BIG.logp_R,), "small": (SMALL.logp_R,)})
    (mean,) = objective.mean_teacher_logp(stats, batch)
    assert mean.tolist() == [-1.0, -6.0, -3.0]


def test_a_source_without_a_teacher_is_refused_with_the_setting_that_is_missing() -> None:
    objective = GKD(teacher_sources={"math": "big"})
    with pytest.raises(ConfigError, match=r"no teacher for data source 'poems', only for math: add .*poems=NAME"):
        objective.teacher_plan(_batch("math", "poems"))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"teacher_weights": {"a": 0.0}}, r"teacher_weights.a=0.0: must be above 0"),
        ({"teacher_weights": {"a": 1.0}, "teacher_sources": {"b": "c"}}, "give one of them, not both"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        GKD(**fields)


def test_support_says_what_is_asked_of_a_teacher_and_settings_which_teachers() -> None:
    assert GKD().fidelity is Fidelity.FULL
    assert GKD(support="top_k").fidelity is Fidelity.TOP_K
    assert GKD(teacher_sources={"math": "big", "code": "small"}).named_teachers == {"big", "small"}
    assert GKD(teacher_weights={"big": 1.0}).needs.teacher_names == {"big"}
    assert issubclass(GKD, Supervised)
