import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_distill.data.packing import pack
from megatron_distill.errors import DataError
from megatron_distill.types import Batch, MicroBatch, Origin, Prompt, Rollout, Scored, Stop

CPU = torch.device("cpu")


def scored(group: str, sample: int, prompt: tuple[int, ...], response: tuple[int, ...], **fields: object) -> Scored:
    settings: dict[str, object] = {
        "logprobs": tuple(-0.5 * token for token in response),
        "origin": (Origin.STUDENT,) * len(response),
        "version": 0,
    }
    rollout = Rollout(
        prompt=Prompt(id=group, messages=(), tokens=prompt),
        group=group,
        sample=sample,
        tokens=response,
        stop=Stop.EOS,
        **(settings | fields),
    )
    return Scored(rollout=rollout, reward=float(sample))


def packed(step: list[Scored], budget: int = 1000, dp_rank: int = 0, dp_size: int = 1, **multiples: int) -> Batch:
    return pack(
        step, dp_rank=dp_rank, dp_size=dp_size, tokens_per_micro_batch=budget, device=CPU, version=3, **multiples
    )


def random_step(sizes: list[tuple[int, int]]) -> list[Scored]:
    """Every token is different, so that each can be followed."""
    count = 0
    step = []
    for number, (prompt, response) in enumerate(sizes):
        tokens = tuple(range(count, count + prompt + response))
        count += prompt + response
        step.append(scored(f"{number // 2:03d}", number % 2, tokens[:prompt], tokens[prompt:]))
    return step


def test_one_sequence_by_hand() -> None:
    (micro,) = packed([scored("a", 0, (10, 11, 12), (20, 21))]).micro
    assert micro.input_T.tolist() == [10, 11, 12, 20]  # the last token's logits score nothing
    assert micro.position_T.tolist() == [0, 1, 2, 3]
    assert micro.cu_seqlens.tolist() == [0, 4]
    assert micro.cu_seqlens.dtype == torch.int32
    assert micro.response_R.tolist() == [2, 3]
    assert micro.target_R.tolist() == [20, 21]
    assert micro.rollout_logp_R.tolist() == [-10.0, -10.5]


def test_two_sequences_with_padding_by_hand() -> None:
    step = [scored("a", 0, (10, 11), (20, 21)), scored("b", 0, (12,), (22,), logprobs=None)]
    (micro,) = packed(step, sequence_multiple=2, total_multiple=8).micro
    assert micro.input_T.tolist() == [10, 11, 20, 0, 12, 0, 0, 0]
    assert micro.position_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert micro.cu_seqlens.tolist() == [0, 4, 8]
    assert micro.response_R.tolist() == [1, 2, 4]
    assert micro.target_R.tolist() == [20, 21, 22]
    assert micro.segment_R.tolist() == [0, 0, 1]
    assert micro.rollout_logp_R[:2].tolist() == [-10.0, -10.5]
    assert bool(micro.rollout_logp_R[2].isnan())
    assert micro.lengths_S().tolist() == [2, 1]


sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 40), st.integers(1, 3), st.sampled_from([(1, 1), (2, 1), (4, 6), (1, 8)]), st.randoms())
def test_every_response_token_is_predicted_once_from_its_own_past(
    sizes: list[tuple[int, int]], budget: int, dp_size: int, multiples: tuple[int, int], rng: random.Random
) -> None:
    step = random_step(sizes)
    arrived = rng.sample(step, len(step))
    each, total = multiples
    batches = [
        packed(arrived, budget, rank, dp_size, sequence_multiple=each, total_multiple=total) for rank in range(dp_size)
    ]
    seen: list[int] = []
    for micro in (micro for batch in batches for micro in batch.micro):
        check_shape(micro, each, total)
        for row, target, segment in zip(
            micro.response_R.tolist(), micro.target_R.tolist(), micro.segment_R.tolist(), strict=True
        ):
            whole = micro.sequences[segment].rollout
            tokens = whole.prompt.tokens + whole.tokens
            start = int(micro.cu_seqlens[segment])
            place = row - start
            assert tokens[place + 1] == target
            assert micro.input_T[start : row + 1].tolist() == list(tokens[: place + 1])
            assert micro.position_T[start : row + 1].tolist() == list(range(place + 1))
            seen.append(target)
    assert sorted(seen) == sorted(token for one in step for token in one.rollout.tokens)
    assert len({len(batch.micro) for batch in batches}) == 1
    assert {batch.counts for batch in batches} == {batches[0].counts}
    assert batches[0].counts.tokens == len(seen)
    assert batches[0].counts.sequences == len(step)


def check_shape(micro: MicroBatch, each: int, total: int) -> None:
    bounds = micro.cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == micro.input_T.numel() == micro.position_T.numel()
    assert micro.input_T.numel() % total == 0
    assert all((end - start) % each == 0 and end > start for start, end in pairwise(bounds))
    assert len(bounds) == max(len(micro.sequences), 1) + 1
    assert micro.reward_S.numel() == micro.group_S.numel() == micro.index_S.numel() == len(micro.sequences)


def test_numbering_is_the_same_under_every_cut_and_order() -> None:
    step = random_step([(random.Random(i).randint(1, 9), random.Random(-i).randint(1, 9)) for i in range(10)])

    def numbers(batches: list[Batch]) -> dict[tuple[str, int], tuple[int, int]]:
        return {
            (one.rollout.group, one.rollout.sample): (index, group)
            for batch in batches
            for micro in batch.micro
            for one, index, group in zip(micro.sequences, micro.index_S.tolist(), micro.group_S.tolist(), strict=True)
        }

    whole = numbers([packed(step)])
    assert sorted(index for index, _ in whole.values()) == list(range(10))
    assert whole[("002", 0)][1] == whole[("002", 1)][1] != whole[("003", 0)][1]
    assert numbers([packed(step[::-1], 20, rank, 3) for rank in range(3)]) == whole


def test_order_of_arrival_changes_nothing() -> None:
    step = random_step([(3, 4), (5, 5), (2, 2), (8, 1), (1, 8), (4, 4)])
    first, other = packed(step, 16), packed(random.Random(0).sample(step, 6), 16)
    for one, two in zip(first.micro, other.micro, strict=True):
        assert torch.equal(one.input_T, two.input_T)
        assert torch.equal(one.index_S, two.index_S)


def test_budget_is_kept_and_a_longer_sequence_sits_alone() -> None:
    step = random_step([(4, 5), (4, 5), (4, 5), (20, 21), (1, 2)])
    micro = packed(step, 18).micro
    sizes = sorted((one.input_T.numel(), len(one.sequences)) for one in micro)
    assert sizes == [(8, 1), (18, 3), (40, 1)]


def test_tokens_are_balanced_over_ranks() -> None:
    rng = random.Random(5)
    step = random_step([(rng.randint(1, 40), rng.randint(1, 200)) for _ in range(64)])
    loads = [sum(micro.rows for micro in packed(step, 400, rank, 4).micro) for rank in range(4)]
    assert max(loads) - min(loads) <= 0.1 * max(loads)


def test_a_rank_without_sequences_gets_empty_micro_batches() -> None:
    step = [scored("a", 0, (1, 2), (3, 4))]
    batch = packed(step, dp_rank=1, dp_size=2, sequence_multiple=4)
    (micro,) = batch.micro
    assert micro.rows == 0
    assert micro.sequences == ()
    assert micro.cu_seqlens.tolist() == [0, 4]
    assert micro.input_T.tolist() == [0] * 4
    assert micro.lengths_S().numel() == 0
    assert batch.counts.tokens == 2
    assert batch.counts.groups == 1


def test_unusable_rollouts_are_refused() -> None:
    good = scored("a", 0, (1,), (2,))
    cases = {
        "response is empty": [good, scored("a", 1, (1,), ())],
        "prompt has no tokens": [scored("a", 1, (), (1,))],
        "comes twice": [good, good],
        "must have one length": [scored("a", 0, (1,), (2, 3), logprobs=(-1.0,))],
        "no rollouts": [],
    }
    for reason, step in cases.items():
        with pytest.raises(DataError, match=reason):
            packed(step)


def test_versions_and_the_temperature_of_log_probs_follow_the_tokens() -> None:
    step = [
        scored("a", 0, (1, 2), (3, 4, 5), version=6, versions=(6, 7, 7), temperature=0.7),
        scored("b", 0, (1,), (8, 9), version=7, temperature=0.7),
    ]
    batch = packed(step)
    versions = torch.cat([micro.version_R for micro in batch.micro])
    assert versions.tolist() == [6, 7, 7, 7, 7]
    assert batch.temperature == 0.7
    other = scored("b", 0, (1,), (8, 9), temperature=1.0)
    assert packed([step[0], other]).temperature is None, "not of one temperature"
