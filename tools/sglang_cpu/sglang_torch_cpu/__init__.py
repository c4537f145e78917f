"""A platform for SGLang on which every operation is torch's own, so that its real server runs on any CPU.

SGLang's own CPU engine needs kernels that are built from source for a few processors. A platform from outside may name
the implementation of every fused operation instead; `native` is the plain torch one that each of them carries.

SGLang looks the platform up by its entry point. It stays out of the way unless SGLANG_PLATFORM=torch_cpu asks for it.
"""

from __future__ import annotations

import os


def activate() -> str | None:
    """Where the platform's class is, if this process asked for it."""
    if os.environ.get("SGLANG_PLATFORM") != "torch_cpu":
        return None
    return "sglang_torch_cpu.platform.TorchCpuPlatform"
