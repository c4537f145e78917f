"""CPU and GPU as two implementations of one protocol; nothing outside `runtime/` asks which one it runs on."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_distill.errors import ConfigError
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Fp8, Precision

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


DEVICE = "MEGATRON_DISTILL_DEVICE"
"""Environment variable: `cpu` keeps a run off the GPUs of a machine that has some."""


class Backend(Protocol):
    """What differs between machines."""

    device: torch.device
    collectives: str
    te_layers: bool
    """Whether layers are TransformerEngine's, which name norms after the projection they are fused into."""
    losses: Literal["eager", "compiled"]
    """Which backend of `losses` to use where nobody says."""

    def prepare(self) -> None:
        """Once per process, before Megatron is used."""

    def megatron(self) -> AbstractContextManager[None]:
        """Entered around every call into Megatron."""

    def refusals(self, parallel: ParallelSizes, precision: Precision) -> list[str]:
        """Why these settings cannot run here, one sentence each; empty if they can."""

    def block(self, qk_norm: bool, layers: int) -> Any:
        """Megatron's spec of a stack of transformer layers."""

    def place_rotary(self, model: Any, inverse_frequencies: Tensor) -> None:
        """Give a freshly built GPTModel its rotary frequencies."""

    def layout(self, model: Any, cu_seqlens: Tensor, position_T: Tensor, cp: int, cp_rank: int) -> PackedSeqParams:
        """What attention must know of a packed micro-batch; `position_T` are this rank's rows."""

    def peak_memory(self) -> float:
        """GiB this process held at most."""


def _import_megatron() -> None:
    """Import what will be used later, where its warnings about optional packages stay unsaid."""
    with _quiet():
        for name in ("models.gpt.gpt_layer_specs", "pipeline_parallel", "optimizer", "dist_checkpointing"):
            importlib.import_module(f"megatron.core.{name}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within: warnings that Megatron and torch.distributed give of each other stay unsaid; ours do not."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", module=r"megatron\.|torch\.distributed\.|megatron_distill\.runtime\.megatron_cpu"
        )
        yield


class CpuBackend:
    """Megatron's local layers over gloo."""

    device = torch.device("cpu")
    collectives = "gloo"
    te_layers = False
    losses: Literal["eager", "compiled"] = "eager"  # compiling takes longer than most runs on a CPU do

    def prepare(self) -> None:
        from megatron_distill.runtime import megatron_cpu

        # torch says at import that it found a compiler for GPUs and no GPU: true, and of no interest here
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        megatron_cpu.install()
        _import_megatron()

    @contextlib.contextmanager
    def megatron(self) -> Iterator[None]:
        from megatron_distill.runtime import megatron_cpu

        with _quiet(), megatron_cpu.cuda_names_on_cpu():
            yield

    def refusals(self, parallel: ParallelSizes, precision: Precision) -> list[str]:
        refused = []
        if precision.fp8 is not None:
            refused.append(
                "precision.fp8 needs TransformerEngine on a GPU, and this machine has none (Megatron-Core would "
                "ignore it silently): remove precision.fp8"
            )
        return refused

    def block(self, qk_norm: bool, layers: int) -> Any:
        from megatron_distill.runtime.layers import local_block

        return local_block(qk_norm, layers)

    def place_rotary(self, model: Any, inverse_frequencies: Tensor) -> None:
        from megatron_distill.runtime.layers import PackedRotary

        model.rotary_pos_emb = PackedRotary(inverse_frequencies)

    def layout(self, model: Any, cu_seqlens: Tensor, position_T: Tensor, cp: int, cp_rank: int) -> PackedSeqParams:
        from megatron_distill.runtime.layers import packed_layout

        model.rotary_pos_emb.position_T = position_T
        return packed_layout(cu_seqlens, cp, cp_rank)

    def peak_memory(self) -> float:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class CudaBackend:
    """TransformerEngine's layers over NCCL."""

    collectives = "nccl"
    te_layers = True
    losses: Literal["eager", "compiled"] = "compiled"

    def __init__(self) -> None:
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def prepare(self) -> None:
        torch.cuda.set_device(self.device)
        _import_megatron()

    def megatron(self) -> AbstractContextManager[None]:
        return _quiet()

    def refusals(self, parallel: ParallelSizes, precision: Precision) -> list[str]:
        refused = []
        if importlib.util.find_spec("transformer_engine") is None:
            refused.append(
                "this machine has a GPU, whose layers need TransformerEngine, and it is not installed: install the "
                f"extra `te`, or run on the CPU with {DEVICE}=cpu"
            )
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if here > torch.cuda.device_count():
            refused.append(
                f"{here} ranks were started on a machine with {torch.cuda.device_count()} GPUs: one GPU each; start "
                f"fewer, or run on the CPU with {DEVICE}=cpu"
            )
        if precision.fp8 is not None and (missing := _capability_missing(precision.fp8)):
            refused.append(missing)
        return refused

    def block(self, qk_norm: bool, layers: int) -> Any:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)

    def place_rotary(self, model: Any, inverse_frequencies: Tensor) -> None:
        model.rotary_pos_emb.inv_freq = inverse_frequencies.to(self.device)

    def layout(self, model: Any, cu_seqlens: Tensor, position_T: Tensor, cp: int, cp_rank: int) -> PackedSeqParams:
        from megatron.core.packed_seq_params import PackedSeqParams

        on_device = cu_seqlens.to(self.device)
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=on_device,
            cu_seqlens_kv=on_device,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    def peak_memory(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30


def _capability_missing(fp8: Fp8) -> str:
    """Why this GPU cannot compute in FP8 like that; empty if it can."""
    capability = torch.cuda.get_device_capability()
    needed = (10, 0) if fp8.recipe == "mxfp8" else (8, 9)
    if capability >= needed:
        return ""
    return (
        f"precision.fp8.recipe={fp8.recipe} needs compute capability {needed[0]}.{needed[1]}, this GPU has "
        f"{capability[0]}.{capability[1]}: choose another recipe or remove precision.fp8"
    )


def choose() -> Backend:
    """The backend of this machine: CUDA where there is a GPU, unless the environment says `cpu`.

    Raises:
        ConfigError: the environment variable names neither.
    """
    wanted = os.environ.get(DEVICE, "")
    if wanted not in ("", "cpu", "cuda"):
        raise ConfigError(f"{DEVICE}={wanted}: must be cpu or cuda; unset, a GPU is used where there is one")
    if wanted == "cpu" or (not wanted and not torch.cuda.is_available()):
        return CpuBackend()
    if not torch.cuda.is_available():
        raise ConfigError(f"{DEVICE}=cuda: torch sees no GPU on this machine; unset it to run on the CPU")
    return CudaBackend()
