"""How much memory a computation needs beyond what was there before it: exactly, from the allocator's own log.

On a CPU torch's profiler tells every allocation of every tensor, those of compiled code included; the sum over time
has a highest point, and that does not depend on the machine. What libraries take behind torch's back (a matrix
product's packing buffers) is not in it: `high_water` asks the kernel, as a cross-check.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_beyond_inputs(run: Callable[[], Any]) -> int:
    """Bytes of tensors alive at the worst moment of `run`, over those alive before it; results count."""
    gc.collect()
    if torch.cuda.is_available():
        return _peak_on_gpu(run)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    del kept
    return highest(_allocations(profiler))


def highest(changes: list[int]) -> int:
    """Highest point of a running sum that begins at 0."""
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak


def _allocations(profiler: Any) -> list[int]:
    """Bytes allocated (positive) and freed (negative) on the CPU, in order of time."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    on_cpu = [event for event in events if event.device_type() == torch.autograd.DeviceType.CPU]
    return [event.nbytes() for event in sorted(on_cpu, key=lambda event: event.start_ns())]


def _peak_on_gpu(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return int(torch.cuda.max_memory_allocated() - before)


def high_water(run: Callable[[], Any]) -> int | None:
    """Bytes of resident memory that `run` needed at most, over those before it, as the kernel saw them.

    None where the kernel does not tell. It sees pages, buffers of libraries and what the heap kept from before, so it
    means something for large tensors only, and only if `machine.retain_heap` was not called.
    """
    if torch.cuda.is_available() or not _CLEAR.exists():
        return None
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    _CLEAR.write_text("5", encoding="ascii")  # resets the mark to what is resident now
    before = _resident("VmRSS")
    kept = run()
    peak = _resident("VmHWM")
    del kept
    return max(peak - before, 0)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024
