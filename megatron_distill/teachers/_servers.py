"""Who keeps a teacher's servers alive: the run that has started them, or somebody else. First rank only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_distill.errors import EngineError
from megatron_distill.rollout.servers import Device, ServerGroup, ServerSettings

PAUSE_SECONDS = 2.0
"""Between two looks whether a server is back."""


class Servers(Protocol):
    """Some servers that run one model."""

    @property
    def urls(self) -> list[str]:
        """Where they listen."""

    def revive(self, lost: Sequence[str]) -> None:
        """Return when servers that were lost are back, or enough others serve.

        Raises:
            EngineError: they do not come back.
        """

    def close(self) -> None:
        """End those that the run has started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """Servers that run already, which somebody else restarts when they die."""

    urls: list[str]
    seconds: float
    """How long to wait for them."""
    reacting: Callable[[], Sequence[str]]
    """Which of them react now."""

    def revive(self, lost: Sequence[str]) -> None:
        """Wait until any of the servers reacts."""
        end = time.monotonic() + self.seconds
        while not self.reacting():
            if time.monotonic() > end:
                raise EngineError(
                    f"{', '.join(self.urls)}: none of the teacher's servers came back within {self.seconds:g} s; start "
                    "them again (python -m launch.servers restarts its own), then resume the run from its checkpoint"
                )
            time.sleep(PAUSE_SECONDS)

    def close(self) -> None:
        """Nothing: they are not the run's."""


@dataclass(frozen=True, slots=True)
class Started:
    """Servers of the run's own."""

    group: ServerGroup

    @property
    def urls(self) -> list[str]:
        """Where they listen."""
        return self.group.urls

    def revive(self, lost: Sequence[str]) -> None:
        """Start them again, all at a time; they load the model themselves."""
        gone = [process for process in self.group.processes if process.url in lost]
        for process in gone:
            process.kill()
            process.start()
        for process in gone:
            process.wait_ready()

    def close(self) -> None:
        """End them."""
        self.group.stop()


def start(settings: ServerSettings, model: Path, device: Device, logs: Path | None) -> Started:
    """Servers that answer.

    Raises:
        EngineError: one does not come up; then none runs.
    """
    group = ServerGroup(settings, model, device, name="teacher", logs=logs)
    group.start()
    group.wait_ready()
    return Started(group)
