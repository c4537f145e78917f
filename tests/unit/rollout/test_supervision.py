"""What may become of a server: above all, none that was gone serves again before it was given the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_distill.rollout.engines._supervision import NEXT, Roster, State

EVENTS: dict[str, Callable[[Roster, str], object]] = {
    "started": lambda roster, name: roster.started(name, 0.0),
    "pushed": lambda roster, name: roster.pushed(name, 0.0),
    "doubt": lambda roster, name: roster.doubt(name, "no answer", 0.0),
    "trust": lambda roster, name: roster.trust(name, 0.0),
    "outdate": lambda roster, name: roster.outdate(name, "another version", 0.0),
    "lose": lambda roster, name: roster.lose(name, "killed", 0.0),
    "restart": lambda roster, name: roster.restart(name, 0.0),
}


def test_the_life_of_a_server_that_dies_once() -> None:
    roster = Roster(["a", "b"], most_restarts=1)
    for name in ("a", "b"):
        roster.started(name, now=1.0)
        roster.pushed(name, now=2.0)
    roster.doubt("a", "no answer", now=3.0)
    assert roster.within(State.SERVING) == ["b"]
    assert (roster["a"].since, roster["a"].why) == (3.0, "no answer")
    roster.lose("a", "its process has ended", now=4.0)
    assert roster.restart("a", now=5.0)
    roster.started("a", now=6.0)
    assert roster.within(State.STALE) == ["a"], "it answers, and has no weights yet"
    roster.pushed("a", now=7.0)
    assert roster.within(State.SERVING) == ["a", "b"]
    assert roster["a"].why == "its process has ended", "what was last wrong is remembered"


def test_restarts_are_bounded_for_all_together() -> None:
    roster = Roster(["a", "b"], most_restarts=1)
    for name in ("a", "b"):
        roster.started(name, now=0.0)
        roster.lose(name, "killed", now=1.0)
    assert roster.restart("a", now=2.0)
    assert not roster.restart("b", now=2.0)
    assert roster.within(State.RETIRED) == ["b"]
    assert roster.restarts == 1


@given(st.lists(st.sampled_from(sorted(EVENTS)), max_size=40), st.integers(0, 3))
def test_nobody_serves_without_weights_whatever_happens(events: list[str], most_restarts: int) -> None:
    """Any sequence of events, those that cannot follow left out: weights are lost with the process."""
    roster = Roster(["a"], most_restarts)
    has_weights = False
    for event in events:
        before = roster["a"].state
        try:
            EVENTS[event](roster, "a")
        except AssertionError:
            assert roster["a"].state is before, "what is refused changes nothing"
            continue
        has_weights = (has_weights or event == "pushed") and event not in ("lose", "started", "outdate")
        if roster["a"].state is State.SERVING:
            assert has_weights
        assert roster.restarts <= most_restarts


@pytest.mark.parametrize("gone", [State.DEAD, State.RESTARTING, State.RETIRED])
def test_no_way_back_but_through_stale(gone: State) -> None:
    reached, border = {gone}, [gone]
    while border:
        for state in NEXT[border.pop()] - {State.STALE} - reached:
            reached.add(state)
            border.append(state)
    assert State.SERVING not in reached
