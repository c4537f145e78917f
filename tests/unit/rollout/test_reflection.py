"""What a reply must be to become a micro-reflective trajectory, and which ids it then has."""

from __future__ import annotations

import pytest

from megatron_distill.data.templates import load_tokenizer
from megatron_distill.rollout.reflection import FAILURES, Checks, Reconstruction, copied_tokens, loops, reconstruct
from megatron_distill.testing.tiny import tiny_tokenizer

ATTEMPT = "First I add 2 and 2, which gives 5. Twice that is 10. The answer is 10."
BEGINNING = "First I add 2 and 2, which gives 5."
REPAIR = f"{BEGINNING} Wait, 2 and 2 give 4, not 5. Twice 4 is 8. The answer is 8."
CHECKS = Checks(copied_tokens=4, new_tokens=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """With merges, so that cutting a text anew may cut it otherwise."""
    texts = [ATTEMPT, REPAIR] * 8
    return load_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts, vocab_size=330))


def reply(text: str) -> str:
    return f"<analysis>The sum is wrong.</analysis>\n<reconstruction>\n{text}\n</reconstruction>"


def ids(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_copied_part_keeps_the_ids_it_was_sampled_with(tokenizer) -> None:
    letters = tuple(one for letter in ATTEMPT for one in ids(tokenizer, letter))
    assert letters != ids(tokenizer, ATTEMPT), "the attempt was sampled letter by letter"
    made = reconstruct(tokenizer, reply(REPAIR), (*letters, tokenizer.eos_token_id), 200, CHECKS)
    assert isinstance(made, Reconstruction)
    assert made.copied >= len(BEGINNING)
    assert made.tokens[: made.copied] == letters[: made.copied]
    assert made.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(made.tokens, skip_special_tokens=True) == REPAIR == made.text


@pytest.mark.parametrize("space", [" ", "\n", "\n\n  "])
def test_the_space_that_an_attempt_begins_with_is_part_of_the_copy(tokenizer, space: str) -> None:
    attempt = (*ids(tokenizer, space + ATTEMPT), tokenizer.eos_token_id)
    for text in (REPAIR, space + REPAIR):
        made = reconstruct(tokenizer, reply(text), attempt, 200, CHECKS)
        assert isinstance(made, Reconstruction), made
        assert made.tokens[: made.copied] == attempt[: made.copied]
        assert len(tokenizer.decode(made.tokens[: made.copied])) >= len(space + BEGINNING)
        assert tokenizer.decode(made.tokens, skip_special_tokens=True) == made.text == space + REPAIR


STUDENTS = "Each of the students has 2 pens, and the student at the door 3. That makes 5 pens. The answer is 5."


@pytest.mark.parametrize(
    ("attempt", "text", "leaking"),
    [
        (STUDENTS, STUDENTS[:63] + " Wait, there are two students. The student at the door has 3. It is 7.", False),
        (
            ATTEMPT,
            BEGINNING + " Wait, it is 4. Let the students add: 4. So the correct solution is x = 8.",
            False,
        ),
        (ATTEMPT, BEGINNING + " Wait, here the student errs: it is 4. Twice 4 is 8. The answer is 8.", True),
        (ATTEMPT, BEGINNING + " Wait, by The Correct Solution Provided it is 4. The answer is 8.", True),
        (ATTEMPT, BEGINNING + " Wait, the reference solution says 4. The answer is 8.", True),
        (ATTEMPT, BEGINNING + " Wait, <analysis it is 4. The answer is 8.", True),
        (f"The student says so. {ATTEMPT}", f"The student says so. {REPAIR}", False),
    ],
)
def test_only_new_words_leak_and_only_those_of_the_request(tokenizer, attempt: str, text: str, leaking: bool) -> None:
    made = reconstruct(tokenizer, reply(text), ids(tokenizer, attempt), 200, CHECKS)
    assert (made == "leaks") if leaking else isinstance(made, Reconstruction), made


def test_copying_ends_where_the_texts_part_and_never_within_a_character(tokenizer) -> None:
    attempt = ids(tokenizer, "Größe €5")
    assert copied_tokens(tokenizer, "Größe €5", attempt) == len(attempt)
    euro = copied_tokens(tokenizer, "Größe £5", attempt)
    assert tokenizer.decode(attempt[:euro]) == "Größe "
    assert copied_tokens(tokenizer, "something else", attempt) == 0


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("<reconstruction>no analysis, only this</reconstruction>", "unparsed"),
        (reply(REPAIR) + "<reconstruction>twice</reconstruction>", "unparsed"),
        (reply(""), "unparsed"),
        (reply(REPAIR).replace("</reconstruction>", ""), "unparsed"),
        (reply(f"{BEGINNING} The correct solution provided says 8, and so it is 8."), "leaks"),
        (reply(BEGINNING + " and again twice" * 4), "loops"),
        (reply("Two and two are four. Twice that is 8."), "not_copied"),
        (reply(ATTEMPT), "nothing_new"),
        (reply(REPAIR + " Indeed, eight it is, as one can see by counting." * 2), "too_long"),
    ],
)
def test_a_reply_that_fails_a_check_says_which(tokenizer, text: str, failure: str) -> None:
    attempt = (*ids(tokenizer, ATTEMPT), tokenizer.eos_token_id)
    assert failure in FAILURES
    assert reconstruct(tokenizer, text, attempt, 60, CHECKS) == failure


def test_checks_can_be_switched_off(tokenizer) -> None:
    attempt = ids(tokenizer, ATTEMPT)
    leaking = reply(f"{BEGINNING} The correct solution provided says 8, and so it is 8.")
    off = Checks(copied_tokens=4, new_tokens=4, refuse_leaks=False)
    assert isinstance(reconstruct(tokenizer, leaking, attempt, 200, off), Reconstruction)


def test_a_loop_is_a_tail_of_ten_to_fifteen_hundred_characters_three_times_over() -> None:
    assert loops("so " + "it goes on " * 3)
    assert not loops("so " + "it goes on " * 2)
    assert not loops("hm, " * 2 + "ha " * 3), "shorter than ten characters"
    assert loops("x" + "y" * 1499 + ("a" * 700 + "b" * 800) * 3)


@pytest.mark.parametrize("fields", [{"copied_tokens": -1}, {"new_tokens": 0}, {"copied_fraction": 1.5}])
def test_bounds_are_checked(fields) -> None:
    with pytest.raises(ValueError, match="copied_tokens must be 0 or more"):
        Checks(**fields)
