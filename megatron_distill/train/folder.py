"""Folders that a command will write into: looked at before anything starts, and held by one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_distill.errors import ConfigError

LOCK = "lock"
"""In a run folder; it says who holds it, and stays when nobody does."""


def check_writable(folder: Path, setting: str) -> None:
    """Make the folder, and a file in it that leaves nothing behind.

    Raises:
        ConfigError: what `setting` names cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"{setting}: {folder} cannot be written ({error.strerror}); name a folder where you may write"
        ) from error


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a run folder for as long as the body runs; the system lets go of it however this process ends.

    Raises:
        ConfigError: it cannot be written, or another process holds it.
    """
    check_writable(folder, "paths.run")
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(
                f"paths.run: {folder} is in use by {holder}; wait until that run has ended, or choose another paths.run"
            ) from None
        except OSError:
            pass  # some network file systems have no locks; that is no reason to refuse a run
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
