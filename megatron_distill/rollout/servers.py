"""SGLang servers as processes of this machine: started, watched, ended, and started anew at the same address.

Nothing here knows what a server is asked, or which weights it has. A server belongs to the process that started it and
ends with it, whatever ends that one (`runtime.keep`).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_distill.errors import EngineError
from megatron_distill.rollout.server_settings import (
    Device,
    ServerSettings,
    bound,
    choose_ports,
    read_api_key,
    server_command,
    server_environment,
    server_python,
)
from megatron_distill.runtime.processes import kept_process

__all__ = ["Device", "ServerGroup", "ServerProcess", "ServerSettings", "read_api_key", "server_python"]

POLL_SECONDS = 0.25
PROBE_SECONDS = 5.0
FREED_SECONDS = 10.0
"""How long the port of a server that was killed may take to be free."""
LAST_LINES = 15


class ServerProcess:
    """One server: started, watched, ended and started anew, always at the same address."""

    def __init__(
        self, settings: ServerSettings, model: Path, device: Device, *, index: int, port: int, name: str, log: Path
    ) -> None:
        self.settings = settings
        self.model = model
        self.device: Device = device
        self.index = index
        self.name = name
        self.log = log
        self.port = port
        self.starts = 0
        """How often it was started; one less is how often anew."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._key: str | None = None
        self._secret: tempfile.TemporaryDirectory[str] | None = None
        self._written = 0
        self._ready_by = 0.0

    @property
    def pid(self) -> int:
        """The server's first process, which leads the group of all of them.

        Raises:
            EngineError: it was never started.
        """
        if self._process is None:
            raise EngineError(f"{self.name} ({self.url}): not started yet")
        return self._process.pid

    def start(self) -> None:
        """Begin it; returns at once.

        Raises:
            EngineError: its port is taken, there is no interpreter for it, or no GPU, or its key cannot be read.
        """
        if self.alive():
            raise EngineError(f"{self.name} ({self.url}): runs already")
        self._forget_secret()
        bound(self.settings.host, self.port).close()
        command = server_command(
            self.settings, self.model, self.device, self.port, seed=1 + self.index + 1000 * self.starts
        )
        changes = server_environment(self.settings, self.device, self.index)
        command += self._secret_arguments()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as output:
            self._written = output.tell()
            self._process = kept_process(command, changes, output)
        self.starts += 1
        self._ready_by = time.monotonic() + self.settings.start_seconds

    def _secret_arguments(self) -> list[str]:
        """The key in a file that only the owner can read, and that is gone as soon as the server has read it."""
        self._key = key = read_api_key(self.settings.api_key_file)
        if key is None:
            return []
        self._secret = tempfile.TemporaryDirectory(prefix="server-")
        file = Path(self._secret.name) / "key.yaml"
        with open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as output:
            output.write(f"api-key: {json.dumps(key)}\n")
        return ["--config", str(file)]

    def _forget_secret(self) -> None:
        if self._secret is not None:
            self._secret.cleanup()
            self._secret = None

    def alive(self) -> bool:
        """Whether its first process runs; it may still be starting, or hang."""
        return self._process is not None and self._process.poll() is None

    def answers(self) -> bool:
        """Whether it says that it is ready; takes up to 5 s. It says so even if its scheduler hangs: see `reacts`."""
        return self._opens("/health")

    def reacts(self) -> bool:
        """Whether its scheduler answers, which it does not while it takes new weights; takes up to 5 s."""
        return self._opens("/server_info")

    def _opens(self, path: str) -> bool:
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        try:
            with _direct.open(
                urllib.request.Request(self.url + path, headers=headers), timeout=PROBE_SECONDS
            ) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def wait_ready(self) -> None:
        """Return when it answers.

        Raises:
            EngineError: it ended, or takes longer than `start_seconds`; with its last words.
        """
        while not self.check_ready():
            time.sleep(POLL_SECONDS)

    async def ready(self) -> None:
        """`wait_ready` for an event loop."""
        while not await asyncio.to_thread(self.check_ready):
            await asyncio.sleep(POLL_SECONDS)

    def check_ready(self) -> bool:
        """Whether it answers by now.

        Raises:
            EngineError: it ended, or has taken longer than `start_seconds`; with its last words.
        """
        if not self.alive():
            code = self._process.returncode if self._process is not None else None
            raise EngineError(f"{self._who()} {_ended(code)} before it was ready\n{self.last_words()}")
        if self.answers():
            self._forget_secret()
            return True
        if time.monotonic() > self._ready_by:
            raise EngineError(
                f"{self._who()} did not answer within servers.start_seconds={self.settings.start_seconds:g}; allow "
                f"more time, or see what it waits for\n{self.last_words()}"
            )
        return False

    def _who(self) -> str:
        return f"{self.name} ({self.url}, model {self.model}, log {self.log})"

    def last_words(self, lines: int = LAST_LINES) -> str:
        """The end of what it has written since its last start."""
        if not self.log.is_file():
            return ""
        with self.log.open(encoding="utf-8", errors="replace") as file:
            file.seek(self._written)
            written = [line.rstrip() for line in file if line.strip()]
        return "\n".join(f"  {line[:400]}" for line in written[-lines:])

    def kill(self) -> None:
        """End all its processes at once; returns when its port is free. Nothing happens if none runs."""
        self._forget_secret()
        if self._process is None:
            return
        # Where its first process has ended, the keeper has ended the group, whose number may be another's by now.
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        end = time.monotonic() + FREED_SECONDS
        while self._taken() and time.monotonic() < end:
            time.sleep(0.02)

    def restart(self) -> None:
        """Kill what is left of it, start it anew at the same address, and wait until it answers.

        Raises:
            EngineError: it does not come back.
        """
        self.kill()
        self.start()
        self.wait_ready()

    def _taken(self) -> bool:
        try:
            bound(self.settings.host, self.port).close()
        except EngineError:
            return True
        return False


def _ended(code: int | None) -> str:
    if code is None:
        return "was not started"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Never through a proxy of the environment: servers are on this machine."""


class ServerGroup:
    """Servers of one model, started and ended together; a context manager that starts and ends them."""

    def __init__(
        self,
        settings: ServerSettings,
        model: Path,
        device: Device,
        *,
        name: str = "rollout",
        logs: Path | None = None,
    ) -> None:
        """Choose their addresses; nothing runs yet.

        Logs go to `logs`/NAME-INDEX.log; without `logs` to a folder that goes with the group. `settings.python` is
        looked for now.

        Raises:
            EngineError: a port is taken, no interpreter has SGLang, or the key cannot be read.
        """
        settings = replace(settings, python=server_python(settings.python))
        read_api_key(settings.api_key_file)
        ports = choose_ports(settings.host, settings.port, settings.count)
        self._scratch = tempfile.TemporaryDirectory(prefix="servers-") if logs is None else None
        folder = logs if logs is not None else Path(self._scratch.name)  # type: ignore[union-attr]
        self.processes = [
            ServerProcess(
                settings,
                model,
                device,
                index=index,
                port=port,
                name=f"{name}-{index}",
                log=folder / f"{name}-{index}.log",
            )
            for index, port in enumerate(ports)
        ]

    @property
    def urls(self) -> list[str]:
        """Where they listen, in order."""
        return [process.url for process in self.processes]

    def start(self) -> None:
        """Begin all; returns at once.

        Raises:
            EngineError: one cannot be begun; then none runs.
        """
        try:
            for process in self.processes:
                process.start()
        except BaseException:
            self.stop()
            raise

    def wait_ready(self) -> None:
        """Return when all answer.

        Raises:
            EngineError: one ended or takes too long, with its last words; then all are ended.
        """
        try:
            waiting = list(self.processes)
            while waiting := [process for process in waiting if not process.check_ready()]:
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.stop()
            raise

    async def ready(self) -> None:
        """`wait_ready` for an event loop."""
        await asyncio.to_thread(self.wait_ready)

    def stop(self) -> None:
        """End all."""
        for process in self.processes:
            process.kill()
        if self._scratch is not None:
            self._scratch.cleanup()

    def __enter__(self) -> Self:
        """Start them, and wait until all answer."""
        self.start()
        self.wait_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
