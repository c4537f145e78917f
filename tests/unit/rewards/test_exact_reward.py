import pytest

from megatron_distill.rewards.exact import Exact
from megatron_distill.rewards.none import NoReward


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("72", "48+24=72\n#### 72", 1.0),
        ("72", "#### 72.0", 1.0),
        ("72", "#### 72.", 1.0),
        ("1234", "#### $1,234", 1.0),
        ("1,234", "#### 1234", 1.0),
        ("1,23", "#### 123", 0.0),
        ("-5", "#### - 5", 1.0),
        ("72", "#### 71 no wait\n#### 72\nsome more", 1.0),
        ("72", "#### 72 apples", 0.0),
        ("72", "it is 72", 0.0),
        ("72", "####", 0.0),
        ("72", "####\n 72", 1.0),
        ("5", r"so \boxed{5}", 1.0),
        (r"\frac{1}{2}", r"#### 3, or rather \boxed{\frac{1}{2}}", 1.0),
        ("3", r"\boxed{5} #### 3", 1.0),
        ("5", r"\boxed{5", 0.0),
        ("Paris", "#### paris", 1.0),
        ("1e3", "#### 1000", 0.0),
    ],
)
def test_exact_match(gold: str, text: str, reward: float) -> None:
    (verdict,) = Exact().connect().score([(gold, text)])
    assert verdict.reward == reward


def test_marker_and_box_can_be_chosen() -> None:
    marker = Exact(answer_after="Answer:", boxed=False).connect()
    verdicts = marker.score([("5", "Answer: 5"), ("5", r"\boxed{5}"), ("5", "#### 5"), (None, "Answer: 5")])
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0, None]
    assert [verdict.facts.get("reward/answered") for verdict in verdicts] == [1.0, 0.0, 0.0, None]
    boxed = Exact(answer_after=None).connect()
    assert [verdict.reward for verdict in boxed.score([("5", "#### 5"), ("5", r"\boxed{5}")])] == [0.0, 1.0]


def test_no_reward_leaves_everything_unscored() -> None:
    assert [verdict.reward for verdict in NoReward().connect().score([("5", "5"), (None, "")])] == [None, None]
