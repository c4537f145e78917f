from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Barrier, Lock, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_distill.data.prompts import DataSection, load_prompts
from megatron_distill.data.templates import load_tokenizer
from megatron_distill.data.traces import read_traces
from megatron_distill.errors import CheckpointError, DataError
from megatron_distill.rewards.base import Verdict, Verifier
from megatron_distill.rewards.exact import Exact
from megatron_distill.rewards.none import NoReward
from megatron_distill.rollout.base import Given, Sampling
from megatron_distill.rollout.sources.base import SourcePart, Surroundings
from megatron_distill.rollout.sources.demonstrations import Demonstrations
from megatron_distill.rollout.sources.generate import Generate
from megatron_distill.rollout.sources.prefix import Prefix
from megatron_distill.rollout.sources.replay import Replay
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.types import Origin, Scored, Stop

BUILDING = Lock()
"""`transformers` replaces its own methods while it builds a model: two threads at once leave them replaced for good."""


class Threads:
    """A world of threads: every `gather_objects` waits for all ranks."""

    def __init__(self, rank: int, board: list[Any], barrier: Barrier) -> None:
        self.rank = rank
        self.world = len(board)
        self._board = board
        self._barrier = barrier

    def gather_objects[T](self, value: T) -> list[T]:
        self._board[self.rank] = value
        self._barrier.wait()
        gathered = list(self._board)
        self._barrier.wait()
        return gathered


class Student:
    """Weights by name, as the trained model gives them."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        return self._model.state_dict().items()


def in_world[T](size: int, work: Callable[[Threads], T]) -> list[T]:
    board: list[Any] = [None] * size
    barrier, results = Barrier(size, timeout=60), dict[int, T]()

    def rank(index: int) -> None:
        results[index] = work(Threads(index, board, barrier))

    threads = [Thread(target=rank, args=(index,)) for index in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[index] for index in range(size)]


def alone() -> Threads:
    return Threads(0, [None], Barrier(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with a tokenizer, and five problems beside it."""
    folder = tiny_model(tmp_path_factory.mktemp("student"), "qwen3", hidden=32)
    tiny_tokenizer(folder)
    rows = [{"question": f"{a}+{a}?", "answer": f"{a} and {a}\n#### {2 * a}"} for a in range(5)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def surroundings(folder: Path, run: Path, ranks: Threads | None = None, **fields: Any) -> Surroundings:
    tokenizer = load_tokenizer(folder)
    section = DataSection(prompts=folder / "train.jsonl", answer_after="####", solution_key="answer")
    verifier: Verifier = Exact(answer_after=None)
    settings = {
        "ranks": ranks or alone(),
        "tokenizer": tokenizer,
        "prompts": load_prompts(section, tokenizer),
        "verifier": verifier,
        "student_folder": folder,
        "valid_vocab": 259,
        "run_folder": run,
        "seed": 3,
        "prompts_per_step": 3,
        "steps": 10,
        "device": torch.device("cpu"),
    }
    return Surroundings(**(settings | fields))


def steps(
    part: SourcePart, around: Surroundings, count: int, start: dict[str, int] | None = None
) -> list[list[Scored]]:
    with BUILDING:
        source, student = part.connect(around), Student(around.student_folder)
    source.publish(student, version=4)
    if start is not None:
        source.restore(start)
    first = 0 if start is None else start["position"] // around.prompts_per_step
    made = [source.next(first + step) for step in range(count)]
    source.close()
    return made


PART = Generate(samples_per_prompt=2, sampling=Sampling(max_new_tokens=8))


def test_generated_steps_are_groups_in_order(folder: Path, tmp_path: Path) -> None:
    first, second = steps(PART, surroundings(folder, tmp_path), 2)
    places = [(one.rollout.group, one.rollout.sample) for one in first + second]
    assert places == sorted(places)
    assert len({group for group, _ in places}) == 6, "a prompt that comes again is another group"
    assert len({one.rollout.prompt.id for one in first}) == 3
    for one in first:
        assert one.rollout.version == 4
        assert one.rollout.origin == (Origin.STUDENT,) * len(one.rollout.tokens)
        assert one.rollout.logprobs is not None
        assert one.reward == 0.0
    assert first[0].rollout.tokens != first[1].rollout.tokens
    assert not (tmp_path / "traces").exists()


def same(one: list[list[Scored]], other: list[list[Scored]]) -> bool:
    """Equal in all but the last bits of log-probs, which depend on the shape of a batch."""

    def key(scored: Scored) -> tuple[object, ...]:
        rollout = scored.rollout
        return rollout.group, rollout.sample, rollout.prompt, rollout.tokens, rollout.stop, scored.reward

    return [[key(x) for x in step] for step in one] == [[key(x) for x in step] for step in other]


@pytest.mark.parametrize("world", [2, 4, 7])
def test_any_number_of_ranks_draws_the_same_rollouts(folder: Path, tmp_path: Path, world: int) -> None:
    expected = steps(PART, surroundings(folder, tmp_path), 2)
    for found in in_world(world, lambda ranks: steps(PART, surroundings(folder, tmp_path, ranks), 2)):
        assert same(found, expected)


def test_resume_draws_what_an_uninterrupted_run_draws(folder: Path, tmp_path: Path) -> None:
    whole = steps(PART, surroundings(folder, tmp_path), 3)
    source = PART.connect(surroundings(folder, tmp_path))
    source.publish(Student(folder), version=4)
    source.next(0)
    saved = json.loads(json.dumps(source.state()))
    source.close()
    assert steps(PART, surroundings(folder, tmp_path), 2, start=saved) == whole[1:]
    with pytest.raises(CheckpointError, match="held 9 prompts, these are 5"):
        source.restore({"position": 3, "size": 9})


def test_replay_gives_back_what_was_recorded(folder: Path, tmp_path: Path) -> None:
    part = Generate(samples_per_prompt=2, sampling=Sampling(max_new_tokens=8), record=True)
    recorded = steps(part, surroundings(folder, tmp_path), 2)
    assert steps(Replay(path=tmp_path / "traces"), surroundings(folder, tmp_path / "other"), 2) == recorded
    source = Replay(path=tmp_path / "traces").connect(surroundings(folder, tmp_path))
    assert source.next(1) == recorded[1]
    with pytest.raises(DataError, match="no rollouts of step 2; it holds steps 0 to 1"):
        source.next(2)
    with pytest.raises(DataError, match=r"token id .* ids below 10; .* another tokenizer"):
        Replay(path=tmp_path / "traces").connect(surroundings(folder, tmp_path, valid_vocab=10))


def test_recording_happens_once_in_a_world(folder: Path, tmp_path: Path) -> None:
    part = Generate(samples_per_prompt=2, sampling=Sampling(max_new_tokens=4), record=True)
    made = in_world(2, lambda ranks: steps(part, surroundings(folder, tmp_path, ranks), 1))
    assert read_traces(tmp_path / "traces") == {0: made[0][0]}


def test_demonstrations_are_the_worked_solutions(folder: Path, tmp_path: Path) -> None:
    around = surroundings(folder, tmp_path, verifier=NoReward())
    (step,) = steps(Demonstrations(), around, 1)
    for one in step:
        rollout = one.rollout
        assert around.tokenizer.decode(rollout.tokens) == rollout.prompt.hints["solution"] + "<|im_end|>"
        assert rollout.origin == (Origin.CONSTRUCTED,) * len(rollout.tokens)
        assert rollout.logprobs is None
        assert one.reward is None
        assert rollout.stop is Stop.EOS
    (cut,) = steps(Demonstrations(max_response_tokens=3), around, 1)
    assert all(len(one.rollout.tokens) == 3 and one.rollout.stop is Stop.LENGTH for one in cut)
    assert all(2 not in one.rollout.tokens for one in cut), "a cut response has no end of sequence"


def test_demonstrations_and_rollouts_walk_the_prompts_alike(folder: Path, tmp_path: Path) -> None:
    demonstrated = steps(Demonstrations(), surroundings(folder, tmp_path), 3)
    sampled = steps(PART, surroundings(folder, tmp_path), 3)
    for one, two in zip(demonstrated, sampled, strict=True):
        assert [x.rollout.prompt.id for x in one] == [x.rollout.prompt.id for x in two[::2]]


def test_on_policy_fraction_chooses_whole_steps_by_seed(folder: Path, tmp_path: Path) -> None:
    def sampled(fraction: float, seed: int) -> list[bool]:
        part = Generate(sampling=Sampling(max_new_tokens=2), on_policy_fraction=fraction)
        made = steps(part, surroundings(folder, tmp_path, seed=seed, prompts_per_step=1), 40)
        kinds = [{one.rollout.logprobs is not None for one in step} for step in made]
        assert all(len(kind) == 1 for kind in kinds)
        return [kind.pop() for kind in kinds]

    assert not any(sampled(0.0, 1))
    half = sampled(0.5, 1)
    assert 10 <= sum(half) <= 30
    assert half == sampled(0.5, 1) != sampled(0.5, 2)


def test_what_the_data_lacks_is_told_at_the_start(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    bare = load_prompts(DataSection(prompts=folder / "train.jsonl", answer_key=None), tokenizer)
    around = surroundings(folder, tmp_path, prompts=bare)
    with pytest.raises(DataError, match=r"5 of 5 prompts have no gold answer.*reward\.kind=none"):
        Generate().connect(around)
    Generate().connect(surroundings(folder, tmp_path, prompts=bare, verifier=NoReward())).close()
    for part in (Demonstrations(), Generate(on_policy_fraction=0.5)):
        with pytest.raises(DataError, match=r"5 of 5 prompts have no worked solution.*data\.solution_key"):
            part.connect(surroundings(folder, tmp_path, prompts=bare, verifier=NoReward()))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="samples_per_prompt=0: must be at least 1"):
        Generate(samples_per_prompt=0)
    with pytest.raises(ValueError, match=r"on_policy_fraction=1\.5: must be from 0 to 1"):
        Generate(on_policy_fraction=1.5)


def test_a_teacher_begins_and_the_student_goes_on(folder: Path, tmp_path: Path) -> None:
    part = Prefix(samples_per_prompt=2, sampling=Sampling(max_new_tokens=12), longest=6)
    around = surroundings(folder, tmp_path, steps=4)
    made = steps(part, around, 4)
    for step, length in enumerate([6, 5, 3, 1]):
        for one in made[step]:
            rollout = one.rollout
            text = rollout.prompt.hints["solution"]
            taught = around.tokenizer(text, add_special_tokens=False)["input_ids"][:length]
            assert rollout.tokens[:length] == tuple(taught)
            assert rollout.origin == (Origin.TEACHER,) * length + (Origin.STUDENT,) * (len(rollout.tokens) - length)
            assert [logp != logp for logp in rollout.logprobs or ()] == [origin == 1 for origin in rollout.origin]
            assert length < len(rollout.tokens) <= 12
            assert rollout.text.startswith(text[:length])
    assert len({one.rollout.tokens for one in made[0]}) == len(made[0]), "samples of a group go on differently"


def test_the_continuation_is_what_the_student_writes_after_that_start(folder: Path, tmp_path: Path) -> None:
    """Scored again as one sequence, the student's tokens have the log-probs that came with them."""
    part = Prefix(sampling=Sampling(max_new_tokens=10), longest=4)
    around = surroundings(folder, tmp_path)
    with BUILDING:
        source, student = part.connect(around), Student(around.student_folder)
    source.publish(student, version=0)
    for one in source.next(0):
        tokens = one.rollout.prompt.tokens + one.rollout.tokens
        (scores,) = source.engine.score([Given(tokens=tokens, start=len(one.rollout.prompt.tokens))])
        assert one.rollout.logprobs is not None
        assert one.rollout.logprobs[4:] == pytest.approx(scores[4:], abs=1e-5)
    source.close()


def test_a_teacher_that_ends_within_its_share_leaves_nothing_to_write(folder: Path, tmp_path: Path) -> None:
    part = Prefix(samples_per_prompt=3, sampling=Sampling(max_new_tokens=40))
    (scored,) = steps(part, surroundings(folder, tmp_path), 1)
    assert len(scored) == 3, "one per prompt, however many samples were asked for"
    for one in scored:
        assert set(one.rollout.origin) == {Origin.TEACHER}
        assert one.rollout.stop is Stop.EOS
        assert one.rollout.tokens[-1] == 2


def test_a_prefix_needs_the_teachers_responses(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5 of 5 prompts have no hint 'reply' to begin with"):
        Prefix(hint="reply").connect(surroundings(folder, tmp_path))


class Coin(Verifier):
    """Right and wrong by the length of the response: some groups are mixed, some are not."""

    def connect(self) -> Coin:
        return self

    def score(self, pairs: list[tuple[str | None, str]]) -> list[Verdict]:
        return [Verdict(float(len(text) % 2)) for _, text in pairs]

    def close(self) -> None:
        """Nothing to close."""


def test_groups_whose_rewards_are_alike_are_replaced(folder: Path, tmp_path: Path) -> None:
    part = Generate(samples_per_prompt=2, sampling=Sampling(max_new_tokens=8), keep_groups="mixed", most_rounds=50)
    (scored,) = steps(part, surroundings(folder, tmp_path, verifier=Coin()), 1)
    groups: dict[str, set[float | None]] = {}
    for one in scored:
        groups.setdefault(one.rollout.group, set()).add(one.reward)
    assert list(groups.values()) == [{0.0, 1.0}] * 3
    assert sorted(groups)[-1] > "000000000002", "some were left out, so prompts beyond the first three were asked"


def test_a_step_without_mixed_groups_ends_in_one_clear_error(folder: Path, tmp_path: Path) -> None:
    part = Generate(samples_per_prompt=2, sampling=Sampling(max_new_tokens=2), keep_groups="mixed", most_rounds=2)
    with pytest.raises(DataError, match=r"step 0: after rollout.most_rounds=2 rounds 3 of 3 groups still have rewards"):
        steps(part, surroundings(folder, tmp_path), 1)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"keep_groups": "mixed"}, "samples_per_prompt=1: keep_groups=mixed needs 2 or more"),
        ({"most_rounds": 0}, "most_rounds=0: must be at least 1"),
    ],
)
def test_settings_of_refilling_are_checked(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Generate(**fields)


def test_a_prefix_is_no_longer_than_the_response() -> None:
    with pytest.raises(ValueError, match=r"longest=9: must be from 0 to sampling.max_new_tokens=8"):
        Prefix(sampling=Sampling(max_new_tokens=8), longest=9)
