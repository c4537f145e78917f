"""`python -m launch.servers CONFIG [a.b=c ...]`: the SGLang servers that a run's config names, kept alive until Ctrl-C.

For servers that outlive a run or live on another machine than it: those of `rollout.engine` (the student's) and of
every remote teacher. Where the config has `urls`, they are started there, so that run and servers share one file;
elsewhere at `servers.port`, and the addresses are printed as the overrides that the run needs. A server that dies or
hangs is started anew at its address. A run that finds it again gives it the weights.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from megatron_distill.config import RunConfig, load
from megatron_distill.errors import ConfigError, DistillError
from megatron_distill.rollout.engines.sglang import SGLang
from megatron_distill.rollout.server_settings import is_loopback
from megatron_distill.rollout.servers import Device, ServerGroup, ServerProcess, ServerSettings
from megatron_distill.runtime.backend import choose
from megatron_distill.teachers.remote import RemotePart

LOOK_SECONDS = 1.0
SILENT_SECONDS = 60.0
"""How long a server that was ready may leave looks unanswered before it counts as hung, besides the time that it may
take for new weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Servers of one model that a config asks for."""

    where: str
    """The part of the config that uses them."""
    name: str
    model: Path
    settings: ServerSettings


def wanted(run: RunConfig) -> list[Wanted]:
    """All servers that a run talks to.

    Raises:
        ConfigError: it talks to none, or its `urls` are not ports in a row on one host.
    """
    found = []
    engine = getattr(run.rollout, "engine", None)
    if isinstance(engine, SGLang):
        found.append(_wanted("rollout.engine", "rollout", run.student.model, engine.servers, engine.urls))
    for name, teacher in run.teachers.items():
        if isinstance(teacher, RemotePart):
            settings = teacher.servers
            if teacher.trust_remote_code:
                settings = replace(settings, arguments=(*settings.arguments, "--trust-remote-code"))
            found.append(_wanted(f"teachers.{name}", f"teacher-{name}", teacher.model, settings, teacher.urls))
    if not found:
        raise ConfigError(
            "this run talks to no server: set rollout.engine.kind=sglang, or the kind of a teacher to remote"
        )
    return found


def silent_seconds(run: RunConfig) -> float:
    """Longest that a server which is well leaves a look unanswered: while a bucket of new weights comes."""
    engine = getattr(run.rollout, "engine", None)
    return SILENT_SECONDS + (engine.sync.timeout_seconds if isinstance(engine, SGLang) else 0)


def _wanted(where: str, name: str, model: Path, settings: ServerSettings, urls: Sequence[str]) -> Wanted:
    if urls:
        parts = [urlsplit(url) for url in urls]
        ports = [part.port or 80 for part in parts]
        if len({part.hostname for part in parts}) > 1 or ports != list(range(ports[0], ports[0] + len(ports))):
            raise ConfigError(
                f"{where}.urls: {', '.join(urls)}: servers that are started together have one host and ports in a row; "
                f"start the others from where they are to run, with {where}.urls=[...] of their own"
            )
        if is_loopback(settings.host) and not is_loopback(parts[0].hostname or ""):
            raise ConfigError(
                f"{where}.urls: nobody reaches {urls[0]} while servers listen at {where}.servers.host={settings.host}: "
                "set that to an address of this machine on a network that is yours alone, or 0.0.0.0 for all of them"
            )
        settings = replace(settings, count=len(urls), port=ports[0])
    return Wanted(where=where, name=name, model=model, settings=settings)


class Watch:
    """Servers that are started anew when they die or hang."""

    def __init__(self, groups: Sequence[ServerGroup], silent_seconds: float) -> None:
        """
        Args:
            groups: all servers; started.
            silent_seconds: longest that a server may leave looks unanswered.
        """
        self.processes = [process for group in groups for process in group.processes]
        self._silent_seconds = silent_seconds
        self._heard: dict[str, float] = {}
        """When a server that was ready answered last."""

    def wait_ready(self) -> None:
        """Return when all answer.

        Raises:
            EngineError: one does not, with its last words.
        """
        for process in self.processes:
            process.wait_ready()
            self._heard[process.url] = time.monotonic()

    def look(self) -> None:
        """Look at each once, and begin those anew that have ended or hang.

        Raises:
            EngineError: one that was begun anew does not come up, with its last words.
        """
        for process in self.processes:
            heard = self._heard.get(process.url)
            if heard is None:
                self._look_at_start(process)
            elif not process.alive():
                self._anew(process, "has ended")
            elif process.reacts():
                self._heard[process.url] = time.monotonic()
            elif time.monotonic() - heard > self._silent_seconds:
                self._anew(process, f"has not answered for {self._silent_seconds:g} s")

    def _look_at_start(self, process: ServerProcess) -> None:
        if process.check_ready():
            self._heard[process.url] = time.monotonic()
            say(f"{process.name} at {process.url}: ready again, without the weights of a run")

    def _anew(self, process: ServerProcess, why: str) -> None:
        say(f"{process.name} at {process.url}: {why}; starting it anew. Its last words:\n{process.last_words(5)}")
        process.kill()
        process.start()
        del self._heard[process.url]


def say(text: str) -> None:
    """A line for a person, at once."""
    print(text, flush=True)


def serve(run: RunConfig) -> None:
    """Start all servers of a run's config and keep them alive; returns only by an exception.

    Raises:
        DistillError: servers cannot be started, or do not come up.
    """
    device: Device = "cpu" if choose().device.type == "cpu" else "cuda"
    everything = wanted(run)
    logs = run.paths.run / "servers"
    groups: list[ServerGroup] = []
    try:
        for one in everything:
            groups.append(ServerGroup(one.settings, one.model, device, name=one.name, logs=logs))
        for one, group in zip(everything, groups, strict=True):
            say(f"starting {len(group.urls)} of {one.model} for {one.where}, logs in {logs}")
            group.start()
        watch = Watch(groups, silent_seconds(run))
        watch.wait_ready()
        for one, group in zip(everything, groups, strict=True):
            say(f"ready: {one.where}.urls=[{','.join(group.urls)}]")
        while True:
            time.sleep(LOOK_SECONDS)
            watch.look()
    finally:
        for group in groups:
            group.stop()


class Stopped(Exception):
    """Somebody asked this process to end."""


def _stop(number: int, _: object) -> None:
    # a second signal must not cut the stopping short
    signal.signal(number, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code: 0 when somebody ended it, 2 for what a person can put right."""
    parser = argparse.ArgumentParser(prog="python -m launch.servers", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or its name under configs/")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="as for megatron-distill train")
    chosen = parser.parse_args(words)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        serve(load(chosen.config, chosen.overrides))
    except Stopped as why:
        say(f"stopped by {why}: no server runs any more")
        return 0
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
