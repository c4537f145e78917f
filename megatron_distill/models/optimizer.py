"""Megatron's distributed Adam and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_distill.runtime.start import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSection:
    """Section `optimizer`: AdamW, its state sharded over data-parallel ranks and kept in fp32."""

    lr: float = 1e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Where the schedule ends."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes from `lr` to `min_lr` after the warm-up; `constant` stays."""
    warmup_steps: int = 0
    """Steps of linear warm-up; step k of w runs at lr * k / w."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled; never on norms and biases."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 leaves gradients alone."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: must be positive")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr={self.min_lr}: must lie between 0 and lr={self.lr}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}: must not be negative")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: both must lie in [0, 1)")
        if self.clip_grad < 0 or self.weight_decay < 0 or not self.eps > 0:
            raise ValueError("clip_grad and weight_decay must not be negative, and eps must be positive")


def wrap_in_ddp(model: Any, runtime: Runtime) -> Any:
    """Megatron's DistributedDataParallel: gradients summed in fp32 over data-parallel and context-parallel ranks."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
    )
    wrapped = DistributedDataParallel(model.config, settings, model, pg_collection=runtime.mesh.groups)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.no_sync_func = wrapped.no_sync
    return wrapped


def build_optimizer(section: OptimizerSection, module: Any, runtime: Runtime, steps: int) -> tuple[Any, Any]:
    """The optimizer of a wrapped model and its schedule over `steps` updates."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.betas[0],
        adam_beta2=section.betas[1],
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        bf16=runtime.precision.dtype == "bf16",
        params_dtype=runtime.precision.torch_dtype,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(config, [module])
    for one in optimizer.chained_optimizers:
        if not one.is_stub_optimizer:
            # so that a run whose every step so far was skipped has a state to save
            one.init_state_fn(one.optimizer, one.config)
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.warmup_steps,
        lr_decay_steps=max(steps, section.warmup_steps + 1),
        lr_decay_style=section.schedule,
        # Megatron leaves decay off norms and biases only through this schedule
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    return optimizer, schedule
