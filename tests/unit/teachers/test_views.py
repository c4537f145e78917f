"""What a teacher is shown: rendered text, ids that are never cut anew, and where the response lies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from megatron_distill.data.packing import pack
from megatron_distill.data.phrases import Phrases
from megatron_distill.data.templates import load_tokenizer, render
from megatron_distill.errors import DataError
from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.sdzero import SDZero
from megatron_distill.teachers._views import Privileged, Revision, View, check_hints
from megatron_distill.testing.tiny import tiny_tokenizer
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop, TokenStats

CPU = torch.device("cpu")
END = 2
"""The tiny tokenizer's end of sequence."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def scored(
    tokenizer: PreTrainedTokenizerBase, response: str = "it is 4", *, reward: float | None = 1.0, stop: Stop = Stop.EOS
) -> Scored:
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"})
    written = tuple(tokenizer(response, add_special_tokens=False)["input_ids"])
    tokens = (*written, END) if stop is Stop.EOS else written
    prompt = Prompt(
        id="0-abc",
        messages=messages,
        tokens=render(tokenizer, messages),
        hints={"solution": "two and {problem} and \\boxed{4}", "feedback": "well done"},
    )
    rollout = Rollout(
        prompt=prompt,
        group="g",
        sample=0,
        tokens=tokens,
        logprobs=(-0.5,) * len(tokens),
        origin=(Origin.STUDENT,) * len(tokens),
        stop=stop,
        version=0,
    )
    return Scored(rollout=rollout, reward=reward)


def test_by_default_a_teacher_reads_the_students_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    one = scored(tokenizer)
    assert View().same
    assert View().context(tokenizer, one) == one.rollout.prompt.tokens
    assert View().reading(tokenizer, one) == one


def test_a_privileged_prompt_is_the_template_in_the_last_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    view = View(
        privileged=Privileged(
            template="{problem} Known: {solution}; {feedback}. Box it: \\boxed{x}",
            hints=("solution", "feedback"),
            instruction="Go.",
        )
    )
    one = scored(tokenizer)
    assert tokenizer.decode(view.context(tokenizer, one)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "2+2? Known: two and {problem} and \\boxed{4}; well done. Box it: \\boxed{x}\nGo.<|im_end|>\n"
        "<|im_start|>assistant\n"
    ), "braces in a hint, and other braces of the template, are left alone"
    assert view.reading(tokenizer, one).rollout.tokens == one.rollout.tokens


def test_the_thinking_switch_is_the_teachers_own(tokenizer: PreTrainedTokenizerBase) -> None:
    import copy

    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'yes' if enable_thinking else 'no' }}"
    )
    for switch, word in ((True, "yes"), (False, "no")):
        view = View(privileged=Privileged(template="{problem}{solution}", thinking=switch))
        assert thinking.decode(view.context(thinking, scored(tokenizer))).endswith(word)


def test_the_shipped_template_shows_problem_and_solution(tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.decode(View(privileged=Privileged()).context(tokenizer, scored(tokenizer)))
    assert "2+2?\n" in text
    assert "--- solution ---\ntwo and {problem} and \\boxed{4}\n--- end of solution ---" in text


def test_a_revision_shows_the_response_without_its_end_then_the_verdict(tokenizer: PreTrainedTokenizerBase) -> None:
    view = View(revision=Revision(phrases=Phrases(right="Good.", wrong="No!")))
    for reward, word in ((1.0, "Good."), (0.0, "No!"), (0.5, "No!"), (0.51, "Good.")):
        one = scored(tokenizer, reward=reward)
        context = view.context(tokenizer, one)
        asked = one.rollout.prompt.tokens
        assert context[: len(asked)] == asked
        assert tokenizer.decode(context[len(asked) :]) == f"it is 4\n\n{word}\n\n"
        assert END not in context[len(asked) :], "the end of the first copy would close the conversation"
        assert view.reading(tokenizer, one).rollout.tokens[-1] == END, "the second copy keeps it: it is judged"


def test_a_response_that_was_cut_off_is_copied_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    view = View(revision=Revision(phrases=Phrases(right="a", wrong="b")))
    one = scored(tokenizer, stop=Stop.LENGTH)
    shown = view.context(tokenizer, one)[len(one.rollout.prompt.tokens) :]
    assert shown[: len(one.rollout.tokens)] == one.rollout.tokens


def test_both_copies_are_the_sampled_ids_even_where_text_would_be_cut_otherwise(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    one = scored(tokenizer)
    odd = tuple(reversed(one.rollout.tokens[:-1]))
    one = replace(one, rollout=replace(one.rollout, tokens=(*odd, END)))
    context = View(revision=Revision()).context(tokenizer, one)
    assert context[len(one.rollout.prompt.tokens) :][: len(odd)] == odd


def test_a_revision_without_a_verdict_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"without a reward has no phrase.*reward\.kind=math"):
        View(revision=Revision()).context(tokenizer, scored(tokenizer, reward=None))


def test_what_does_not_fit_is_cut_to_half_of_the_room_for_both_models(tokenizer: PreTrainedTokenizerBase) -> None:
    view = View(revision=Revision(phrases=Phrases(right="ok", wrong="no")))
    one = scored(tokenizer, "x" * 20)
    asked, phrase = len(one.rollout.prompt.tokens), 6  # "\n\nok\n\n" over bytes
    whole = asked + 20 + phrase + 21
    assert view.fit(tokenizer, one, whole) is one
    cut = view.fit(tokenizer, one, whole - 1)
    assert cut is not None
    room = (whole - 1 - asked - phrase) // 2
    assert cut.rollout.tokens == one.rollout.tokens[:room]
    assert len(cut.rollout.tokens) == len(cut.rollout.origin) == len(cut.rollout.logprobs or ())
    assert cut.rollout.stop is Stop.LENGTH
    assert cut.reward == 1.0, "the verdict is that of the whole response"
    read = view.reading(tokenizer, cut).rollout
    assert len(read.prompt.tokens) + len(read.tokens) <= whole - 1
    assert view.fit(tokenizer, one, asked + phrase + 1) is None
    limited = replace(view, max_tokens=asked + phrase + 2)
    cut = limited.fit(tokenizer, one, whole)
    assert cut is not None
    assert cut.rollout.tokens == one.rollout.tokens[:1]


def test_a_cut_for_the_teachers_sake_is_no_truncation(tokenizer: PreTrainedTokenizerBase) -> None:
    view = View(revision=Revision(phrases=Phrases(right="ok", wrong="no")))

    def cut_to(one: Scored, less: int) -> Scored:
        whole = len(view.reading(tokenizer, one).rollout.prompt.tokens) + len(one.rollout.tokens)
        cut = view.fit(tokenizer, one, whole - less)
        assert cut is not None
        return cut

    for stop in (Stop.EOS, Stop.LENGTH):
        one = scored(tokenizer, "x" * 20, stop=stop)
        once = cut_to(one, 4)
        twice = cut_to(once, 6)  # two teachers, either with a limit of its own
        assert len(twice.rollout.tokens) < len(once.rollout.tokens) < len(one.rollout.tokens)
        for cut in (one, once, twice):
            batch = pack([cut], dp_rank=0, dp_size=1, tokens_per_micro_batch=200, device=CPU, version=0)
            plan, _ = SDZero().prepare(TokenStats(), batch, Scope(seed=0, step=0), {})
            learned = len(cut.rollout.tokens) if stop is Stop.EOS else 0
            assert plan.weights["reverse_kl"][0].count_nonzero() == learned
            assert cut.reward == 1.0


def test_what_could_not_be_scored_is_left_out_unless_nothing_was(tokenizer: PreTrainedTokenizerBase) -> None:
    view = View(revision=Revision())
    known, unknown = scored(tokenizer), scored(tokenizer, reward=None)
    assert view.fit_all(tokenizer, [unknown, known], 500) == [known]
    with pytest.raises(DataError, match="without a reward has no phrase"):
        view.fit_all(tokenizer, [unknown, unknown], 500)
    with pytest.raises(DataError, match="no response of the step fits behind what a teacher reads first, within 9"):
        view.fit_all(tokenizer, [unknown, known], 9)
    assert View(max_tokens=400).fit_all(tokenizer, [unknown], 500) == [unknown], "only a revision shows the verdict"


def test_a_privileged_context_leaves_the_response_what_is_left(tokenizer: PreTrainedTokenizerBase) -> None:
    view = View(privileged=Privileged(template="{problem}{solution}"))
    one = scored(tokenizer)
    context = len(view.context(tokenizer, one))
    assert view.fit(tokenizer, one, context + 8) is one
    cut = view.fit(tokenizer, one, context + 3)
    assert cut is not None
    assert cut.rollout.tokens == one.rollout.tokens[:3]
    assert view.fit(tokenizer, one, context) is None


def test_hints_that_prompts_lack_are_told_before_the_start(tokenizer: PreTrainedTokenizerBase) -> None:
    full = scored(tokenizer).rollout.prompt
    bare = replace(full, hints={})
    view = View(privileged=Privileged(template="{problem}{feedback}", hints=("feedback",)))
    check_hints("me", view, [full])
    with pytest.raises(DataError, match=r"teachers\.me\.view: 1 of 2 prompts.*data\.hint_keys\.feedback=COLUMN"):
        check_hints("me", view, [full, bare])
    with pytest.raises(DataError, match=r"no 'solution' to show the teacher: set data\.solution_key"):
        View(privileged=Privileged()).context(tokenizer, replace_prompt(scored(tokenizer), bare))


def replace_prompt(one: Scored, prompt: Prompt) -> Scored:
    return replace(one, rollout=replace(one.rollout, prompt=prompt))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"template: does not show \{solution\}"):
        Privileged(template="{problem}")
    with pytest.raises(ValueError, match=r"template: does not show \{problem\}"):
        Privileged(template="{solution}")
    with pytest.raises(ValueError, match="hints=\\[\\]: name at least one"):
        Privileged(hints=())
    with pytest.raises(ValueError, match="give one of them, not both"):
        View(privileged=Privileged(), revision=Revision())
    with pytest.raises(ValueError, match="max_tokens=1: must be at least 2"):
        View(max_tokens=1)
