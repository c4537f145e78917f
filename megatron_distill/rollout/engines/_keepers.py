"""Who keeps an engine's servers alive: the run that has started them, or somebody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_distill.errors import EngineError, ServerError
from megatron_distill.rollout.server_settings import Device, ServerSettings, read_api_key
from megatron_distill.rollout.servers import ServerGroup
from megatron_distill.rollout.sglang import Address, Client

POLL_SECONDS = 1.0
"""Between two looks whether somebody else's server is there."""


class Own:
    """Servers of this run, on this machine."""

    def __init__(
        self, settings: ServerSettings, model: Path, device: torch.device | None, run_folder: Path | None
    ) -> None:
        """Choose addresses; nothing runs yet.

        Raises:
            EngineError: a port is taken, there is no environment with SGLang, or the key cannot be read.
        """
        self._key = read_api_key(settings.api_key_file)
        on: Device = "cuda" if device is not None and device.type == "cuda" else "cpu"
        logs = None if run_folder is None else run_folder / "logs"
        self._group = ServerGroup(settings, model, on, name="rollout", logs=logs)
        self._processes = {process.url: process for process in self._group.processes}

    def start(self) -> list[Address]:
        """Begin all; returns when they answer.

        Raises:
            EngineError: one does not; then none runs.
        """
        self._group.start()
        self._group.wait_ready()
        return [Address(url, self._key) for url in self._processes]

    def alive(self, url: str) -> bool:
        """Whether its process runs."""
        return self._processes[url].alive()

    async def revive(self, url: str) -> None:
        """Kill what is left of it, start it at the same address; returns when it answers."""
        process = self._processes[url]
        await asyncio.to_thread(process.kill)
        process.start()
        await process.ready()

    def close(self) -> None:
        """End all."""
        self._group.stop()


class Elsewhere:
    """Servers that run already, which somebody else ends and begins again."""

    def __init__(self, urls: Sequence[str], settings: ServerSettings) -> None:
        """Read the key that they want.

        Raises:
            EngineError: it cannot be read.
        """
        key = read_api_key(settings.api_key_file)
        self._addresses = {address.url: address for address in (Address(url, key) for url in urls)}
        self._seconds = settings.start_seconds

    def start(self) -> list[Address]:
        """Wait until all of them answer.

        Raises:
            EngineError: one does not.
        """
        asyncio.run(self._all_answer())
        return list(self._addresses.values())

    async def _all_answer(self) -> None:
        await asyncio.gather(*map(self.revive, self._addresses))

    def alive(self, url: str) -> bool:
        """Nobody here can tell but by asking it."""
        return True

    async def revive(self, url: str) -> None:
        """Wait until it answers.

        Raises:
            EngineError: it does not within `start_seconds`.
        """
        end = time.monotonic() + self._seconds
        async with Client(self._addresses[url]) as client:
            while True:
                try:
                    await client.call("GET", "/server_info", seconds=POLL_SECONDS * 5)  # its scheduler answers
                    await client.resume()  # a trainer that was killed may have left it paused
                    return
                except ServerError as error:
                    if time.monotonic() > end:
                        raise EngineError(
                            f"{url}: no server answers there since {self._seconds:g} s ({error}); start it, as "
                            "`python -m launch.servers CONFIG` does, or correct rollout.engine.urls"
                        ) from error
                await asyncio.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Nothing: they are not the run's."""
