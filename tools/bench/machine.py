"""What a figure was measured on, and what has to be fixed on a machine before anything is measured.

Nothing here tells where a machine stands: no host name, no path.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megatron_distill.files import write_atomically
from megatron_distill.train.environment import environment

RESULTS = Path(__file__).parent / "results"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def facts() -> dict[str, Any]:
    """Machine, versions, commit and date, as they stand in every results file."""
    known = environment()
    return {
        "hardware": hardware(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": known["python"],
        "packages": known["packages"],
        "git_revision": known["git_sha"],
        "git_changed": known["git_changed"],
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def hardware() -> str:
    """A folder name for this kind of machine, such as `amd-epyc-2-cores`."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_model()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_model() -> str:
    """As the kernel calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def available_gib() -> float:
    """Memory that a new process may take without anybody swapping."""
    pages = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    assert pages is not None
    return int(pages[1]) / 2**20


def one_thread() -> None:
    """Compiled code reads the number of threads when it is compiled: call this first."""
    torch.set_num_threads(1)


def retain_heap() -> None:
    """Freed memory stays with this process: a fresh [T, V] buffer costs no page faults, whoever allocates it.

    Page faults are work of the kernel on behalf of whoever happens to allocate next; they differ from run to run, and
    would weigh most on those that allocate most.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # other C libraries; figures are then a little harsher on the rivals
        return
    assert library.mallopt(_M_MMAP_MAX, 0) == 1
    assert library.mallopt(_M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1)) == 1


def read_results(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """What was last written for this kind of machine; None if nothing."""
    path = folder / hardware() / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found


def write_results(name: str, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write <hardware>/<name>.json with the machine's facts in front."""
    path = folder / hardware() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"machine": facts(), **results}, indent=1) + "\n")
    return path
