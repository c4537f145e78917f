"""Sources in which the student answers twice: revisions of its answers (SD-Zero), repairs of wrong ones (TAPO).

Random tiny models never write a well-formed second answer, so here the words come from a script. Real engines write in
tests/integration/test_every_objective_trains.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_distill.data.phrases import Phrases
from megatron_distill.data.prompts import DataSection, load_prompts
from megatron_distill.data.templates import load_tokenizer
from megatron_distill.errors import DataError
from megatron_distill.rewards.base import Verdict
from megatron_distill.rewards.exact import Exact
from megatron_distill.rollout.base import Completion, Given, HoldsWeights, Request, Sampling
from megatron_distill.rollout.engines.base import Serving
from megatron_distill.rollout.reflection import Checks
from megatron_distill.rollout.sources.base import Surroundings
from megatron_distill.rollout.sources.reflect import Reflect
from megatron_distill.rollout.sources.revise import Revise
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.types import Origin, Scored, Stop
from tests.unit.rollout.test_sources import alone, in_world

type Script = Callable[[str, int], str]
"""(text of the request, sample index) -> reply; one that ends in `...` is cut off there."""

RIGHT, WRONG = "Adding gives\n#### {0}", "Adding, I am sure, gives\n#### {0}1"
REVISED = "Adding once more, for the time of number {1}, gives\n#### {0}"


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """An engine that writes what a script says."""

    script: Script
    context: int | None = None
    tokenizer: Any = None
    version: int = 0

    everywhere: bool = True
    updates_in_flight: bool = False
    needs_weights: bool = False
    weights_come_from_elsewhere: bool = False
    figures: dict[str, float] = field(default_factory=dict)

    def connect(self, serving: Serving) -> Scripted:
        return Scripted(script=self.script, tokenizer=serving.tokenizer)

    def room(self, positions: int) -> int:
        return self.context or positions

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._write(one) for one in requests]

    def _write(self, request: Request) -> Completion:
        text = self.script(self.tokenizer.decode(request.tokens), int(request.key[5]))
        cut = text.endswith("...")
        tokens = tuple(self.tokenizer(text.removesuffix("..."), add_special_tokens=False)["input_ids"])
        tokens = tokens if cut else (*tokens, self.tokenizer.eos_token_id)
        return Completion(
            tokens=tokens, logprobs=(-0.5,) * len(tokens), stop=Stop.LENGTH if cut else Stop.EOS, version=0
        )

    def score(self, given: Sequence[Given], temperature: float = 1.0) -> list[tuple[float, ...]]:
        return [(-0.5,) * (len(one.tokens) - one.start) for one in given]

    def abort(self) -> None:
        """A script is never in the middle of anything."""

    def load_weights(self, student: HoldsWeights, version: int) -> None:
        """A script has none."""

    def close(self) -> None:
        """A script has nothing to give back."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("student"), "qwen3", max_position_embeddings=4096)
    tiny_tokenizer(folder)
    rows = [{"question": f"{a}+{a}?", "answer": str(2 * a)} for a in range(1, 6)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def around(folder: Path, run: Path, ranks: Any = None, thinking: bool | None = None) -> Surroundings:
    tokenizer = load_tokenizer(folder)
    if thinking is not None:
        tokenizer.chat_template += "{{ 'thinking' if enable_thinking else 'at once' }}"
    data = DataSection(prompts=folder / "train.jsonl", shuffle=False, thinking=thinking)
    return Surroundings(
        ranks=ranks or alone(),
        tokenizer=tokenizer,
        prompts=load_prompts(data, tokenizer),
        verifier=Exact(answer_after="####"),
        student_folder=folder,
        valid_vocab=259,
        run_folder=run,
        seed=3,
        prompts_per_step=2,
        steps=10,
        device=None,
    )


def step_of(part: Any, surroundings: Surroundings) -> list[Scored]:
    source = part.connect(surroundings)
    scored = source.next(0)
    source.close()
    return scored


def asked(text: str) -> int:
    """The number that a question of `n+n?` is about."""
    return int(text.split("user\n")[1].split("+")[0])


def revising(text: str, sample: int) -> str:
    """Question 1 is answered right at once, question 2 wrong; revisions with an even sample index are right."""
    number = asked(text)
    first = "start over" not in text and "rephrase" not in text
    right = number == 1 if first else sample % 2 == 0
    return ((RIGHT if first else REVISED) if right else WRONG).format(2 * number, sample)


def test_a_trace_is_answer_phrase_revision_and_only_right_ones_are_kept(folder: Path, tmp_path: Path) -> None:
    surroundings = around(folder, tmp_path)
    kept = step_of(Revise(engine=Scripted(script=revising), revisions=4), surroundings)
    assert [(one.rollout.group[-1], one.rollout.sample) for one in kept] == [("0", 0), ("0", 2), ("1", 0), ("1", 2)]
    for one in kept:
        rollout, number = one.rollout, asked(surroundings.tokenizer.decode(one.rollout.prompt.tokens))
        assert one.reward == 1
        assert rollout.text == REVISED.format(2 * number, rollout.sample), "the verifier read the revised answer alone"
        phrase = Phrases().tokens(surroundings.tokenizer, float(number == 1))
        written = [index for index, origin in enumerate(rollout.origin) if origin is Origin.CONSTRUCTED]
        assert rollout.tokens[written[0] : written[-1] + 1] == phrase
        first = surroundings.tokenizer.decode(rollout.tokens[: written[0]])
        assert first == (RIGHT if number == 1 else WRONG).format(2 * number), "without its end of sequence"
        assert rollout.tokens.count(surroundings.tokenizer.eos_token_id) == 1
        assert rollout.tokens[-1] == surroundings.tokenizer.eos_token_id
        assert [logp != logp for logp in rollout.logprobs or ()] == [
            one is Origin.CONSTRUCTED for one in rollout.origin
        ]


def test_right_answers_may_be_left_alone_and_traces_of_a_prompt_limited(folder: Path, tmp_path: Path) -> None:
    part = Revise(engine=Scripted(script=revising), revisions=4, revise_right=False, most_per_prompt=1)
    (one,) = step_of(part, around(folder, tmp_path))
    assert one.rollout.group.endswith("1")


def test_a_cut_off_answer_is_not_revised(folder: Path, tmp_path: Path) -> None:
    def script(text: str, sample: int) -> str:
        return "Adding..." if asked(text) == 1 else revising(text, sample)

    kept = step_of(Revise(engine=Scripted(script=script)), around(folder, tmp_path))
    assert {one.rollout.group[-1] for one in kept} == {"1"}


def test_an_answer_that_ends_in_a_loop_is_not_revised_and_such_a_revision_not_kept(
    folder: Path, tmp_path: Path
) -> None:
    loop = "\nIt is so, as I said." * 3

    def script(text: str, sample: int) -> str:
        revised = "start over" in text or "rephrase" in text
        # the first answer to question 1 loops; to question 2 the first of its revisions does
        looping = not revised if asked(text) == 1 else revised and sample == 0
        return revising(text, sample) + loop * looping

    part = Revise(engine=Scripted(script=script), revisions=4)
    surroundings = around(folder, tmp_path)
    assert [(one.rollout.group[-1], one.rollout.sample) for one in step_of(part, surroundings)] == [("1", 2)]
    every = step_of(replace(part, refuse_loops=False), surroundings)
    assert [(one.rollout.group[-1], one.rollout.sample) for one in every] == [("0", 0), ("0", 2), ("1", 0), ("1", 2)]


def test_the_same_answer_and_revision_are_kept_once_for_a_prompt_and_step(folder: Path, tmp_path: Path) -> None:
    def script(text: str, sample: int) -> str:
        return (WRONG if "start over" not in text else REVISED).format(2 * asked(text), min(sample, 1))

    part = Revise(engine=Scripted(script=script), revisions=4, most_per_prompt=3)
    surroundings = around(folder, tmp_path)
    kept = step_of(part, surroundings)
    assert [(one.rollout.group[-1], one.rollout.sample) for one in kept] == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    assert len(step_of(replace(part, refuse_copies=False), surroundings)) == 6, "three of either prompt"


def test_what_leaves_no_room_for_a_revision_is_left_out_and_counted(folder: Path, tmp_path: Path) -> None:
    def script(text: str, sample: int) -> str:
        return "Long " * 100 + revising(text, sample) if asked(text) == 1 else revising(text, sample)

    surroundings = around(folder, tmp_path)
    part = Revise(engine=Scripted(script=script), sampling=Sampling(max_new_tokens=3600))
    kept = step_of(part, surroundings)
    assert {one.rollout.group[-1] for one in kept} == {"1"}
    assert all(one.facts["revise/no_room"] == 0.5 and one.facts["revise/cut_off"] == 0 for one in kept)
    short = replace(part, sampling=Sampling(max_new_tokens=3000))
    assert {one.rollout.group[-1] for one in step_of(short, surroundings)} == {"0", "1"}
    narrow = replace(short, engine=Scripted(script=script, context=3500))
    assert {one.rollout.group[-1] for one in step_of(narrow, surroundings)} == {"1"}, "an engine may have less room"


def test_a_student_that_cannot_revise_ends_in_one_clear_error(folder: Path, tmp_path: Path) -> None:
    def script(text: str, sample: int) -> str:
        return WRONG.format(0)

    part = Revise(engine=Scripted(script=script), most_rounds=2)
    with pytest.raises(DataError, match=r"step 0: in rollout.most_rounds=2 rounds of 2 prompts no revision was right"):
        step_of(part, around(folder, tmp_path))


def reflecting(text: str, sample: int) -> str:
    """Of eight answers to question 1 three are right, to question 2 one; the sixth and seventh are cut off."""
    if "<reconstruction>" in text:
        wrong = text.split("Wrong attempt:\n")[1].split("\n\nRight")[0]
        if sample == 3:
            return "I would rather not."
        return (
            f"<analysis>One digit too many.</analysis><reconstruction>{wrong} no, wait, that is a digit too many.\n"
            f"#### {2 if sample != 4 else 3}</reconstruction>"
        )
    number = asked(text)
    if sample in (6, 7):
        return "Adding, adding, ..."
    return (RIGHT if sample < (3 if number == 1 else 1) else WRONG).format(2 * number)


PART = Reflect(
    engine=Scripted(script=reflecting),
    checks=Checks(copied_tokens=8, new_tokens=4),
    sampling=Sampling(max_new_tokens=400),
)
LONG = Sampling(max_new_tokens=2900)


def test_wrong_answers_of_a_mixed_group_are_rebuilt_under_the_plain_prompt(folder: Path, tmp_path: Path) -> None:
    surroundings = around(folder, tmp_path)
    scored = step_of(PART, surroundings)
    originals, built = scored[:16], scored[16:]
    assert all(set(one.rollout.origin) == {Origin.STUDENT} for one in originals)
    assert [one.facts["reflect/eligible"] for one in originals] == [1.0] * 8 + [0.0] * 8, "one right is too few"
    # three whole wrong answers were tried; the script spoils the first repair, and the second is wrong
    tried = {one.rollout.sample: one.facts for one in originals if "reflect/kept" in one.facts}
    assert sorted(tried) == [3, 4, 5]
    assert [tried[sample]["reflect/kept"] for sample in (3, 4, 5)] == [0.0, 1.0, 1.0]
    assert tried[3]["reflect/unparsed"] == 1.0
    assert [(one.rollout.sample, one.reward) for one in built] == [(4, 0.0), (5, 1.0)], "wrong repairs count too"
    for one in built:
        wrong = originals[one.rollout.sample].rollout
        copied = int(one.facts["prefix_tokens"])
        assert one.rollout.group == f"{wrong.group}/ref"
        assert one.rollout.prompt == wrong.prompt, "the plain prompt"
        assert set(one.rollout.origin) == {Origin.CONSTRUCTED}
        assert one.rollout.logprobs is None, "those of the synthesis prompt would be of another context"
        assert one.rollout.tokens[:copied] == wrong.tokens[:copied]
        assert copied == len(wrong.tokens) - 1
        assert "analysis" not in one.rollout.text


def test_a_repair_that_has_no_room_is_not_asked_for(folder: Path, tmp_path: Path) -> None:
    def script(text: str, sample: int) -> str:
        reply = reflecting(text, sample)
        return "Long " * 100 + reply if sample == 4 and "<reconstruction>" not in text else reply

    surroundings = around(folder, tmp_path)
    scored = step_of(replace(PART, engine=Scripted(script=script), sampling=LONG), surroundings)
    assert {one.rollout.sample: one.facts["reflect/no_room"] for one in scored if "reflect/no_room" in one.facts} == {
        3: 0.0,
        4: 1.0,
        5: 0.0,
    }
    assert [one.rollout.sample for one in scored[16:]] == [5]
    narrow = replace(PART, engine=Scripted(script=reflecting, context=LONG.max_new_tokens), sampling=LONG)
    assert len(step_of(narrow, surroundings)) == 16, "an engine may have less room"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsure(Exact):
    """Has no verdict on what holds `UNKNOWN`."""

    def score(self, pairs: Sequence[tuple[str | None, str]]) -> list[Verdict]:
        return Exact.score(self, [(None if UNKNOWN in text else gold, text) for gold, text in pairs])


UNKNOWN = "who knows"


def test_a_group_is_eligible_by_its_verdicts_whether_or_not_there_is_something_to_repair(
    folder: Path, tmp_path: Path
) -> None:
    def script(text: str, sample: int) -> str:
        if asked(text) == 1:  # four wrong ones, all cut off
            return RIGHT.format(2) if sample < 4 else "Adding, adding, ..."
        return RIGHT.format(4) if sample < 4 else WRONG.format(4) + UNKNOWN * (sample > 4)

    surroundings = replace(around(folder, tmp_path), verifier=Unsure(answer_after="####"))
    scored = step_of(replace(PART, engine=Scripted(script=script)), surroundings)
    assert len(scored) == 16, "nothing is repaired"
    assert [one.facts["reflect/eligible"] for one in scored] == [1.0] * 8 + [0.0] * 8


def test_an_answer_without_a_verdict_is_not_revised(folder: Path, tmp_path: Path) -> None:
    def script(text: str, sample: int) -> str:
        return UNKNOWN if asked(text) == 1 else revising(text, sample)

    surroundings = replace(around(folder, tmp_path), verifier=Unsure(answer_after="####"))
    kept = step_of(Revise(engine=Scripted(script=script)), surroundings)
    assert {one.rollout.group[-1] for one in kept} == {"1"}
    assert all(one.facts["revise/unscored"] == 0.5 for one in kept)


def test_no_more_wrong_answers_are_repaired_than_asked_for_and_by_seed(folder: Path, tmp_path: Path) -> None:
    part = Reflect(engine=PART.engine, checks=PART.checks, sampling=PART.sampling, most_repairs=1)
    first, again = (step_of(part, around(folder, tmp_path)) for _ in range(2))
    assert sum("reflect/kept" in one.facts for one in first) == 1
    assert first == again


@pytest.mark.parametrize(
    ("data", "own", "word"),
    [(False, None, "at once"), (True, None, "thinking"), (False, True, "thinking"), (True, False, "at once")],
)
def test_the_request_for_a_repair_is_rendered_as_the_prompts_are_unless_told_otherwise(
    folder: Path, tmp_path: Path, data: bool, own: bool | None, word: str
) -> None:
    requests = []

    def script(text: str, sample: int) -> str:
        if "<reconstruction>" in text:
            requests.append(text)
        return reflecting(text, sample)

    part = replace(PART, engine=Scripted(script=script), thinking=own)
    step_of(part, around(folder, tmp_path, thinking=data))
    assert len(requests) == 3
    assert all(text.endswith(word) for text in requests)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_builds_the_same(folder: Path, tmp_path: Path, world: int) -> None:
    expected = step_of(PART, around(folder, tmp_path))
    for made in in_world(world, lambda ranks: step_of(PART, around(folder, tmp_path, ranks))):
        assert made == expected


def test_a_response_with_braces_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    seen = []

    def script(text: str, sample: int) -> str:
        if "<reconstruction>" in text:
            seen.append(text)
            return "no"
        return "{right}\n#### 2" if sample < 4 else "{problem} {0} \\frac{1}{2}"

    part = Reflect(engine=Scripted(script=script), sampling=PART.sampling)
    step_of(part, around(folder, tmp_path))
    assert seen
    assert all("{problem} {0} \\frac{1}{2}" in text and "{right}\n#### 2" in text for text in seen)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"instruction": "Repair {wrong}!"}, r"instruction: has no place for \{problem\}, \{right\}"),
        ({"samples_per_prompt": 4}, "least_right=2: with least_wrong=4 more than samples_per_prompt=4"),
        ({"most_repairs": 0}, "most_repairs=0: must be at least 1"),
    ],
)
def test_settings_of_repairs_are_checked(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Reflect(**fields)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [({"revisions": 0}, "revisions=0: must be"), ({"most_per_prompt": 0}, "most_per_prompt=0: must be at least 1")],
)
def test_settings_of_revisions_are_checked(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Revise(**fields)


def test_phrases_are_not_empty() -> None:
    with pytest.raises(ValueError, match="wrong: must not be empty"):
        Phrases(wrong=" ")
