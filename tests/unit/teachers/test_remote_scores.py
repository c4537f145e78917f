"""Scores of single responses find their rows on the response axis, however a step is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_distill.data.packing import pack
from megatron_distill.rollout.sglang import Scores
from megatron_distill.teachers._scores import on_responses, where
from megatron_distill.types import Batch, Origin, Prompt, Rollout, Scored, Stop, Token, TopK

LENGTHS = (5, 1, 9, 3, 2, 7)
VOCABULARY = 50
CPU = torch.device("cpu")


def scored_of(lengths: tuple[int, ...] = LENGTHS) -> list[Scored]:
    found = []
    for number, length in enumerate(lengths):
        rollout = Rollout(
            prompt=Prompt(id=str(number), messages=(), tokens=tuple(range(number + 1))),
            group=f"g{number // 2}",
            sample=number % 2,
            tokens=tuple((3 * number + place) % VOCABULARY for place in range(length)),
            logprobs=None,
            origin=(Origin.STUDENT,) * length,
            stop=Stop.EOS,
            version=0,
        )
        found.append(Scored(rollout=rollout, reward=None))
    return found


def said_of(one: Scored, top_k: int) -> Scores:
    """Numbers that name the sequence and the place that they belong to."""
    tokens, start = np.array(one.rollout.tokens), 100 * int(one.rollout.prompt.id)
    logp_R = -np.arange(start, start + len(tokens), dtype=np.float32) - 0.5
    if not top_k:
        return Scores(logprobs=logp_R)
    ids_RK = (tokens[:, None] + np.arange(top_k)).astype(np.int32) % VOCABULARY
    return Scores(logprobs=logp_R, top_ids=ids_RK, top_logprobs=logp_R[:, None] - np.arange(top_k, dtype=np.float32))


def packed(scored: list[Scored], budget: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
    return pack(scored, dp_rank=dp_rank, dp_size=dp_size, tokens_per_micro_batch=budget, device=CPU, version=0)


@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("budget", [4, 12, 20, 1000])
@pytest.mark.parametrize("dp_size", [1, 2, 7])
def test_every_row_holds_what_was_said_of_its_own_token(top_k, budget, dp_size):
    """With more replicas than sequences some micro-batches are empty, and still have a signal."""
    scored = scored_of()
    found = {where(one): said_of(one, top_k) for one in scored}
    judged = 0
    for dp_rank in range(dp_size):
        for micro in packed(scored, budget, dp_rank, dp_size).micro:
            signal = on_responses(micro, found, top_k, CPU)
            assert isinstance(signal, TopK if top_k else Token)
            assert signal.logp_R.shape == (micro.rows,)
            row = 0
            for one in micro.sequences:
                for place, token in enumerate(one.rollout.tokens):
                    assert int(micro.target_R[row]) == token
                    assert float(signal.logp_R[row]) == -100.0 * int(one.rollout.prompt.id) - place - 0.5
                    if isinstance(signal, TopK):
                        assert signal.ids_RK[row].tolist() == [(token + k) % VOCABULARY for k in range(top_k)]
                        assert signal.ids_RK.dtype == torch.int64
                        assert float(signal.top_logp_RK[row, -1]) == float(signal.logp_R[row]) - top_k + 1
                    row += 1
            judged += row
    assert judged == sum(LENGTHS)


def test_rollouts_left_out_of_the_step_leave_no_gap():
    scored = scored_of()
    kept = [one for one in scored if one.rollout.prompt.id not in ("1", "4")]
    (micro,) = packed(kept, 1000).micro
    signal = on_responses(micro, {where(one): said_of(one, 0) for one in kept}, 0, CPU)
    firsts = [float(rows[0]) for rows in signal.logp_R.split([len(one.rollout.tokens) for one in micro.sequences])]
    assert firsts == [-100.0 * int(one.rollout.prompt.id) - 0.5 for one in micro.sequences]
    assert {one.rollout.prompt.id for one in micro.sequences} == {"0", "2", "3", "5"}
