"""Other programs that a rank starts: in which environment, and which GPUs they are given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import torch

_OF_A_RANK = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "PYTHON", "VIRTUAL_ENV")
"""How names begin of what a launcher told this rank, and of what belongs to its own interpreter."""


def kept_process(command: Sequence[str], changes: Mapping[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    """A program in a process group of its own, which dies with this process, whatever ends this process.

    `command` begins with a Python interpreter; `changes` are environment variables beside those of this process,
    without what makes it a rank. Input is empty; `output` takes everything that is printed.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_RANK)}
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("keep.py")), str(os.getpid()), *command],
        env=environment | {"PYTHONUNBUFFERED": "1"} | dict(changes),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES counts them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name.strip() for name in named.split(",") if name.strip()]
