"""What is known of each server, and which changes of it are possible: a table, without servers, clocks or sockets.

One rule matters more than all others: a server that was gone comes back without the run's weights, so the only way
from DEAD or RESTARTING to SERVING leads through STALE, and the only way out of STALE to SERVING is a push of weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """Of one server."""

    STARTING = "starting"
    """Begun for the first time; does not answer yet."""
    STALE = "stale"
    """Answers, and does not hold the weights in force: nobody knows which, or only half of them."""
    SERVING = "serving"
    """Holds the weights in force and gets work."""
    SUSPECT = "suspect"
    """Held them, and just gave no answer, or only part of one."""
    DEAD = "dead"
    """Ended, or silent for so long that it counts as ended."""
    RESTARTING = "restarting"
    """Begun again; does not answer yet."""
    RETIRED = "retired"
    """Given up: it has used up the restarts of the run."""


NEXT: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.STALE, State.DEAD}),
    State.STALE: frozenset({State.SERVING, State.STALE, State.DEAD}),
    State.SERVING: frozenset({State.SERVING, State.SUSPECT, State.STALE, State.DEAD}),
    State.SUSPECT: frozenset({State.SERVING, State.STALE, State.DEAD}),
    State.DEAD: frozenset({State.RESTARTING, State.RETIRED}),
    State.RESTARTING: frozenset({State.STALE, State.DEAD}),
    State.RETIRED: frozenset(),
}
"""Where a server may go from where it is."""

ALIVE = frozenset({State.STALE, State.SERVING, State.SUSPECT})


@dataclass(slots=True, kw_only=True)
class Watched:
    """One server, as it is known."""

    state: State = State.STARTING
    since: float = 0.0
    """When it came into this state, in seconds of the caller's clock."""
    why: str = ""
    """What was last wrong with it."""
    restarts: int = 0


class Roster:
    """All servers of an engine by their address; every method is one event, and refuses what cannot follow.

    `most_restarts` bounds the restarts of all of them together.
    """

    def __init__(self, names: Iterable[str], most_restarts: int) -> None:
        self._watched = {name: Watched() for name in names}
        self._most_restarts = most_restarts

    def __getitem__(self, name: str) -> Watched:
        return self._watched[name]

    def within(self, *states: State) -> list[str]:
        """Who is in one of these states."""
        return [name for name, one in self._watched.items() if one.state in states]

    @property
    def restarts(self) -> int:
        """Of all servers together."""
        return sum(one.restarts for one in self._watched.values())

    def started(self, name: str, now: float) -> None:
        """It answers; whatever it holds, this run has not given it."""
        assert self._watched[name].state in (State.STARTING, State.RESTARTING)
        self._move(name, State.STALE, now)

    def pushed(self, name: str, now: float) -> None:
        """It was given all of the weights in force."""
        assert self._watched[name].state in (State.STALE, State.SERVING, State.SUSPECT)
        self._move(name, State.SERVING, now)

    def doubt(self, name: str, why: str, now: float) -> None:
        """It gave no answer, or only part of one."""
        assert self._watched[name].state is State.SERVING
        self._move(name, State.SUSPECT, now, why)

    def trust(self, name: str, now: float) -> None:
        """It answers again, by the weights in force, and has not ended in between."""
        assert self._watched[name].state is State.SUSPECT
        self._move(name, State.SERVING, now)

    def outdate(self, name: str, why: str, now: float) -> None:
        """It answers, by other weights than those in force."""
        self._move(name, State.STALE, now, why)

    def lose(self, name: str, why: str, now: float) -> None:
        """It has ended, or must be ended."""
        self._move(name, State.DEAD, now, why)

    def restart(self, name: str, now: float) -> bool:
        """Whether it may be begun again; if not, it is retired."""
        allowed = self.restarts < self._most_restarts
        self._move(name, State.RESTARTING if allowed else State.RETIRED, now)
        self._watched[name].restarts += allowed
        return allowed

    def _move(self, name: str, state: State, now: float, why: str = "") -> None:
        one = self._watched[name]
        assert state in NEXT[one.state], f"{name}: {one.state.value} cannot become {state.value}"
        one.state, one.since, one.why = state, now, why or one.why
