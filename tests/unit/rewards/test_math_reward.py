import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from megatron_distill.errors import RewardError
from megatron_distill.rewards.base import Verdict
from megatron_distill.rewards.math import Math, MathJudge

ENDLESS = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def judge() -> Iterator[MathJudge]:
    """One pool for the module: a worker takes seconds to import sympy."""
    judge = Math(timeout_seconds=2.0, processes=2).connect()
    judge.score([("1", "1")])
    yield judge
    judge.close()


def test_equal_answers_in_other_clothes(judge: MathJudge) -> None:
    pairs = [
        ("1/2", r"so \boxed{0.5}", 1.0),
        (r"\frac{1}{2}", r"the answer is $\boxed{\frac{2}{4}}$", 1.0),
        ("72", r"first \boxed{71}, no: \boxed{72}", 1.0),
        ("1234", r"\boxed{1{,}234}", 1.0),
        ("2\\sqrt{2}", r"\boxed{\sqrt{8}}", 1.0),
        ("(1, 2)", r"\boxed{(1,2)}", 1.0),
        ("72", r"\boxed{73}", 0.0),
        ("72", "I do not know", 0.0),
    ]
    verdicts = judge.score([(gold, text) for gold, text, _ in pairs])
    assert [verdict.reward for verdict in verdicts] == [reward for _, _, reward in pairs]
    assert [verdict.facts["reward/answered"] for verdict in verdicts] == [1.0] * 7 + [0.0]


def test_nothing_but_a_box_that_closes_is_an_answer(judge: MathJudge) -> None:
    """A student would learn to end in numbers, or to be cut off in time."""
    texts = [
        "Maybe 7, or 9, or 12",
        "the answer is $12$",
        r"first \boxed{12}, no, that is wrong: \boxed{7",
        "12 apples and then it was cut off at 12",
    ]
    verdicts = judge.score([("12", text) for text in texts])
    assert [(verdict.reward, verdict.facts["reward/answered"]) for verdict in verdicts] == [(0.0, 0.0)] * 4


def test_an_evaluation_may_look_anywhere_but_not_behind_a_box_that_was_begun() -> None:
    lenient = Math(anywhere=True, processes=1).connect()
    verdicts = lenient.score([("12", "the answer is 12"), ("12", r"\boxed{12}, or rather \boxed{1"), ("12", "no idea")])
    lenient.close()
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0]


def test_endless_answers_are_unscored_and_their_neighbours_unharmed(judge: MathJudge) -> None:
    pairs: list[tuple[str | None, str]] = [("72", r"\boxed{72}")] * 20
    pairs[3] = pairs[11] = ("72", ENDLESS)
    pairs[5] = (None, r"\boxed{72}")
    started = time.monotonic()
    verdicts = judge.score(pairs)
    seconds = time.monotonic() - started
    assert [index for index, verdict in enumerate(verdicts) if verdict.reward is None] == [3, 5, 11]
    assert verdicts[3].facts == {"reward/failed": 1.0}
    assert verdicts[5].facts == {}  # nothing to compare with is no failure
    assert all(verdict.reward == 1.0 for index, verdict in enumerate(verdicts) if index not in (3, 5, 11))
    assert seconds < 40, "two deadlines of 2 s and two new processes"
    assert judge.score([("72", r"\boxed{72}")])[0].reward == 1.0


def test_killed_worker_costs_only_its_own_answer(judge: MathJudge) -> None:
    judge.score([("1", "1")])
    verdicts: list[Verdict] = []
    thread = Thread(target=lambda: verdicts.extend(judge.score([("1", ENDLESS), ("1", r"\boxed{1}")])))
    thread.start()  # from another thread on purpose: no signal is involved
    thread.join()
    assert [verdict.reward for verdict in verdicts] == [None, 1.0]


def test_marker_is_read_where_there_is_one() -> None:
    judge = Math(answer_after="####", processes=1).connect()
    verdicts = judge.score([("5", "7 - 2\n#### 5"), ("1234", "#### 1,234"), ("5", r"\boxed{5}"), ("5", "#### 6")])
    assert [verdict.reward for verdict in verdicts] == [1.0, 1.0, 1.0, 0.0]
    judge.close()
    judge.close()


def test_workers_that_cannot_start_are_an_error_not_a_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('a broken installation')")
    monkeypatch.syspath_prepend(tmp_path)
    judge = Math(processes=1).connect()
    with pytest.raises(RewardError, match="die as they start"):
        judge.score([("5", r"\boxed{5}")])


def test_nothing_is_started_before_the_first_answer() -> None:
    before = set(os.listdir("/proc/self/task"))
    judge = Math().connect()
    assert judge.score([(None, "5")])[0].reward is None
    assert set(os.listdir("/proc/self/task")) <= before  # threads of tests before may end meanwhile
    judge.close()


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ValueError, match=r"timeout_seconds=0: must be positive"):
        Math(timeout_seconds=0)
