"""The grid of ranks: its sizes, this rank's place in it, and the few exchanges that are not a loss or a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSizes:
    """Section `parallel`: how many ways the model and the data are cut."""

    tp: int = 1
    """Tensor parallel: ranks that share each layer and the vocabulary."""
    pp: int = 1
    """Pipeline parallel: stages that share the stack of layers (1F1B)."""
    cp: int = 1
    """Context parallel: ranks that share each sequence."""
    dp: int = 1
    """Data parallel: replicas that share the batch; optimizer state is sharded over dp x cp."""
    sequence_parallel: bool = False
    """Cut norms and residuals over the tensor-parallel ranks too; only with tp > 1."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "cp", "dp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel=true needs tp > 1: there is nothing to cut over at tp=1")

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def sequence_multiple(self) -> int:
        """Every packed sequence is padded to a multiple of this: context parallelism cuts each in 2 x cp pieces."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def total_multiple(self) -> int:
        """A micro-batch's T is padded to a multiple of this."""
        return self.sequence_multiple * (self.tp if self.sequence_parallel else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """All ranks in a row: enough for work that only shares Python objects, without Megatron."""

    rank: int
    host: ProcessGroup
    """All ranks, over gloo: for small Python objects."""

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.host.size()

    def gather_objects[T](self, value: T) -> list[T]:
        """Everybody's `value`, by rank, on every rank; small picklable things between our own processes only."""
        if self.world == 1:
            return [value]
        gathered: list[T | None] = [None] * self.world
        dist.all_gather_object(gathered, value, group=self.host)
        return gathered  # type: ignore[return-value]

    def apart(self) -> Ranks:
        """The same ranks over a group of their own, for a second thread of each; collective."""
        host = self.host if self.world == 1 else dist.new_group(backend="gloo")
        return Ranks(rank=self.rank, host=host)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier(group=self.host)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh(Ranks):
    """This rank's place in the grid, and Megatron's process groups, passed explicitly to whoever needs one."""

    sizes: ParallelSizes
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    groups: Any
    """Megatron's ProcessGroupCollection."""

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the output layer: the only stage that sees logits."""
        return self.pp_rank == self.sizes.pp - 1

    @property
    def tp_group(self) -> ProcessGroup | None:
        """Ranks that share the vocabulary; None when one rank holds it all."""
        return self.groups.tp if self.sizes.tp > 1 else None

    def total_over_data(self, values: Tensor) -> Tensor:
        """Sum over data-parallel and context-parallel ranks: over everybody who judged some of the tokens."""
        if self.sizes.dp * self.sizes.cp > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.groups.dp_cp)
        return values

    def from_last_stage(self, values: Tensor) -> Tensor:
        """What the last pipeline stage holds, on every stage; shapes must agree."""
        if self.sizes.pp > 1:
            values = values.clone()
            dist.broadcast(values, src=dist.get_global_rank(self.groups.pp, self.sizes.pp - 1), group=self.groups.pp)
        return values


def all_ranks() -> Ranks:
    """The ranks of the running world; torch.distributed must be up."""
    on_gloo = dist.get_backend() == "gloo"
    host = dist.group.WORLD if on_gloo else dist.new_group(backend="gloo")
    assert host is not None
    return Ranks(rank=dist.get_rank(), host=host)


def build_mesh(sizes: ParallelSizes, *, timeout_minutes: int) -> Mesh:
    """Megatron's process groups for `sizes`; torch.distributed must be up with `sizes.world` ranks."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        context_parallel_size=sizes.cp,
        distributed_timeout_minutes=timeout_minutes,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    ranks = all_ranks()
    return Mesh(
        sizes=sizes,
        rank=ranks.rank,
        host=ranks.host,
        tp_rank=groups.tp.rank(),
        pp_rank=groups.pp.rank(),
        cp_rank=groups.cp.rank(),
        dp_rank=groups.dp.rank(),
        groups=groups,
    )


def take_down_mesh() -> None:
    """Undo `build_mesh`: Megatron keeps groups in module globals, which must not outlive the world."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def zigzag_rows(cu_seqlens: Tensor, cp: int, cp_rank: int) -> Tensor:
    """Rows of T that context-parallel rank `cp_rank` holds, int64 [T / cp], in the order in which it holds them.

    Every sequence is cut in 2 x cp equal pieces; rank r has pieces r and 2 x cp - 1 - r, so that the causal work is
    shared evenly. The layout is the one TransformerEngine's attention expects.
    """
    if cp == 1:
        return torch.arange(int(cu_seqlens[-1]))
    rows = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        piece = (end - start) // (2 * cp)
        for index in (cp_rank, 2 * cp - 1 - cp_rank):
            rows.append(torch.arange(start + index * piece, start + (index + 1) * piece))
    return torch.cat(rows)


def zigzag_order(cu_seqlens: Tensor, cp: int) -> Tensor:
    """For each row of T its place among all ranks' rows put end to end, int64 [T]: undoes `zigzag_rows`."""
    return torch.argsort(torch.cat([zigzag_rows(cu_seqlens, cp, rank) for rank in range(cp)]))
