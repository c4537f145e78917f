"""The one adaptation of Megatron-Core to a machine without CUDA. No other module knows of it.

Megatron-Core names CUDA in four ways that have no setting: functions of `torch.cuda`, `device="cuda"` in calls, type
strings such as "torch.cuda.FloatTensor", and an optimizer class that only TransformerEngine or Apex provide. `install`
answers the first and the last once per process; `cuda_names_on_cpu` answers the others while it is entered, and is
entered only around Megatron's own code. `tests/unit/runtime/test_megatron_cpu.py` asserts that every symbol touched
here still exists in the pinned version.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _Stream:
    """A stream on a machine where everything already runs in order."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def wait_stream(self, other: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: object = None) -> _Event:
        return _Event()


class _Event:
    """An event that has always happened."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def record(self, *_: object) -> None: ...
    def wait(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _: object) -> float:
        return 0.0


class CpuAdam(torch.optim.Optimizer):
    """AdamW with the interface of TransformerEngine's FusedAdam: the step count lives in the parameter group.

    Megatron's distributed optimizer can restore its state only from an optimizer of that shape.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay is built here"
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One AdamW step (Loshchilov and Hutter 2019) over every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self._state_of(weight), group["betas"]
        first, second = state["exp_avg"], state["exp_avg_sq"]
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (second / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
        weight.addcdiv_(first, root, value=-group["lr"] / (1 - beta1 ** group["step"]))

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        return state


class _CudaNamesOnCpu(TorchFunctionMode):
    """Reads `cuda` in a call as the CPU, and lets tensors name their type as CUDA tensors would."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **(kwargs or {}))


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


@contextlib.contextmanager
def cuda_names_on_cpu() -> Iterator[None]:
    """Within: `device="cuda"` is the CPU. Entered around Megatron's code only."""
    with _CudaNamesOnCpu():
        yield


def _get_rng_state(*_: object, **__: object) -> Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: Tensor, *_: object, **__: object) -> None:
    torch.set_rng_state(state)


TORCH_CUDA: dict[str, Any] = {
    "current_device": lambda: _CPU,
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "current_stream": lambda *_: _Stream(),
    "Stream": _Stream,
    "Event": _Event,
    "stream": lambda _: contextlib.nullcontext(),
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": lambda seed: torch.manual_seed(seed),
}
"""What Megatron calls on `torch.cuda`, and what it means here."""

_installed = False


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """Within: `torch.compile` does nothing.

    Megatron decorates some twenty fused functions with it when it is imported, none of which is used on CPU, and the
    decoration alone imports the whole compiler: half of the time that a rank takes to start.
    """
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function if function is not None else lambda wrapped: wrapped
    try:
        yield
    finally:
        torch.compile = compiler


def install() -> None:
    """Make Megatron-Core importable and runnable without CUDA; once per process, before Megatron is used."""
    global _installed
    if _installed:
        return
    for name, stand_in in TORCH_CUDA.items():
        setattr(torch.cuda, name, stand_in)
    with warnings.catch_warnings(), _no_compiler():
        # at import Megatron says that TransformerEngine and Apex are missing: here they cannot be there
        warnings.simplefilter("ignore")
        import megatron.core.optimizer as optimizer
        from megatron.core.optimizer import distrib_optimizer
        from megatron.core.tensor_parallel import random

    vars(random).update(_get_cuda_rng_state=_get_rng_state, _set_cuda_rng_state=_set_rng_state)
    vars(optimizer).update(Adam=CpuAdam, USING_PYTORCH_OPTIMIZER=False)
    vars(distrib_optimizer).update(Adam=CpuAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True)
    _installed = True
