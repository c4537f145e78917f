"""The platform itself; imported only by a server that asked for it."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class TorchCpuPlatform(SRTPlatform, CpuDeviceMixin):
    """A CPU on which torch's attention and torch's operations serve, over gloo where there are several ranks."""

    # "out of tree": the only kind whose rotary embedding does not look for another library's kernel
    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        """The attention that needs no kernels."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """Which implementation of a fused operation is called: the plain torch one."""
        return "native"

    def get_torch_distributed_backend_str(self) -> str:
        """What ranks of one server talk over."""
        return "gloo"

    def empty_cache(self) -> None:
        """Nothing: memory goes back by itself. The default collects garbage, which takes half a second.

        Servers call this before and after new weights arrive, and whenever they have had nothing to do for a while.
        """
