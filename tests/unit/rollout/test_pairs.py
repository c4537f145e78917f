"""Pairs of the data: two responses per prompt, whole or not at all."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_distill.data.prompts import DataSection, load_prompts
from megatron_distill.data.templates import load_tokenizer
from megatron_distill.errors import DataError
from megatron_distill.rewards.none import NoReward
from megatron_distill.rollout.sources.base import Surroundings
from megatron_distill.rollout.sources.pairs import Pairs, check_pair_lengths
from megatron_distill.testing.tiny import tiny_tokenizer
from megatron_distill.types import Origin, Scored, Stop
from tests.unit.rollout.test_sources import alone

PART = Pairs(max_response_tokens=12, long_pairs="skip")


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> Surroundings:
    """Six prompts, of which one has a chosen and one a rejected response of more than twelve tokens."""
    folder = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    rows = [{"question": f"{n}+{n}?", "yes": f"it is {2 * n}", "no": f"no {n}"} for n in range(6)]
    rows[1]["yes"] = "this one is rather long"
    rows[4]["no"] = "and so is this one here"
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(
        prompts=folder / "pairs.jsonl",
        answer_key=None,
        hint_keys={"chosen": "yes", "rejected": "no"},
        shuffle=False,
    )
    tokenizer = load_tokenizer(folder)
    return Surroundings(
        ranks=alone(),
        tokenizer=tokenizer,
        prompts=load_prompts(section, tokenizer),
        verifier=NoReward(),
        student_folder=folder,
        valid_vocab=259,
        run_folder=folder / "run",
        seed=3,
        prompts_per_step=2,
        steps=10,
        device=torch.device("cpu"),
    )


def questions(step: list[Scored]) -> list[str]:
    return [one.rollout.prompt.messages[-1]["content"] for one in step]


def test_a_pair_is_a_group_of_a_chosen_and_a_rejected_response(around: Surroundings) -> None:
    source = PART.connect(around)
    step = source.next(0)
    assert [one.rollout.sample for one in step] == [0, 1, 0, 1]
    assert [one.reward for one in step] == [1.0, 0.0, 1.0, 0.0]
    groups = [one.rollout.group for one in step]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    for one, name in zip(step, ("chosen", "rejected") * 2, strict=True):
        text = one.rollout.prompt.hints[name]
        assert around.tokenizer.decode(one.rollout.tokens) == text + "<|im_end|>"
        assert one.rollout.stop is Stop.EOS
        assert set(one.rollout.origin) == {Origin.CONSTRUCTED}
        assert one.rollout.logprobs is None


def test_a_pair_with_one_long_response_is_skipped_whole_and_counted(around: Surroundings) -> None:
    source = PART.connect(around)
    steps = [source.next(step) for step in range(3)]
    walked = [questions(step)[::2] for step in steps]
    assert walked == [["0+0?", "2+2?"], ["3+3?", "5+5?"], ["0+0?", "2+2?"]]
    counted = [[one.facts.get("rollout/pairs_skipped") for one in step] for step in steps]
    assert counted == [[1.0, None, None, None], [1.0, None, None, None], [1.0, None, None, None]]


def test_resume_goes_on_after_what_was_skipped(around: Surroundings) -> None:
    source = PART.connect(around)
    source.next(0)
    saved = json.loads(json.dumps(source.state()))
    again = PART.connect(around)
    again.restore(saved)
    assert again.next(1) == source.next(1)


def test_long_pairs_are_refused_by_default(around: Surroundings) -> None:
    part = Pairs(max_response_tokens=12)
    with pytest.raises(DataError, match=r"max_response_tokens=12: .* of 24 tokens, the first of 2 pairs"):
        check_pair_lengths(part, around.prompts.items, around.tokenizer)
    with pytest.raises(DataError, match=r"of 24 tokens; raise the limit or set rollout\.long_pairs=skip"):
        part.connect(around).next(0)
    check_pair_lengths(Pairs(max_response_tokens=24), around.prompts.items, around.tokenizer)
    with pytest.raises(DataError, match="no pair of the data is within it"):
        Pairs(max_response_tokens=2, long_pairs="skip").connect(around).next(0)


def test_what_the_data_lacks_is_told_at_the_start(around: Surroundings) -> None:
    with pytest.raises(DataError, match=r"6 of 6 prompts have no 'worse' response.*data\.hint_keys\.worse=COLUMN"):
        Pairs(rejected="worse").connect(around)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="max_response_tokens=0: must be at least 1"):
        Pairs(max_response_tokens=0)
    with pytest.raises(ValueError, match="rejected=chosen: must be another hint"):
        Pairs(rejected="chosen")
