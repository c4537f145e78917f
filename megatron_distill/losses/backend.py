"""Who runs the regions: torch as it stands, torch's compiler, or Triton kernels. One choice for the process.

    eager      any device and fp64; some rows at a time, so that what is in between stays in the processor's cache
    compiled   the same functions through torch.compile: two or three loops over a row that is still in cache
    triton     GPU kernels, see `triton_kernels`

Each backend gives what the others give within rounding (tests/unit/losses/test_backend.py). Compilers are imported
when they are first used, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from megatron_distill.losses import regions
from megatron_distill.losses.regions import Region

type Name = Literal["eager", "compiled", "triton"]

BLOCK_ELEMENTS = {"cpu": 2**17}
"""Logits of one model that the eager backend takes at a time: what a second-level cache holds of a few of them."""
BLOCK_ELEMENTS_ELSEWHERE = 2**24
"""On a GPU small blocks would cost more in launches than they save in memory."""
SCRATCH_ELEMENTS = 2**20
"""What the compiled backend holds of a gradient beside the logits that it overwrites, where it has to."""
_BY_SCRATCH = (regions.jsd_gradient,)
"""On a CPU the compiler stores half of a vector of bf16 through a mask, and a load beside it waits for that store: in
the same place this region would take twice as long. Shorter ones are done with the load by then."""


_COMPILER = {"cpp.enable_floating_point_contract_flag": "fast"}
"""a * b + c in one instruction, rounded once."""


class Backend(Protocol):
    """Runs a region over all rows; see `regions` for its arguments."""

    def sums(self, region: Region, logits: Sequence[Tensor], rows_nR: Tensor | None, *settings: Any) -> Tensor:
        """What a region sums up, [n, R]."""
        ...

    def write(self, region: Region, out_Rv: Tensor, logits: Sequence[Tensor], rows_nR: Tensor, *settings: Any) -> None:
        """What a region gives for every column, into `out_Rv`, which may be `logits[0]` itself."""
        ...


@dataclass(frozen=True, slots=True)
class Eager:
    """Torch operations, a block of rows at a time."""

    block_elements: int | None = None
    """Logits of one model in a block; None chooses by device."""

    def sums(self, region: Region, logits: Sequence[Tensor], rows_nR: Tensor | None, *settings: Any) -> Tensor:
        parts = [
            region([one[block] for one in logits], None if rows_nR is None else rows_nR[:, block], *settings)
            for block in _blocks(logits[0], self._elements(logits[0]))
        ]
        return torch.stack([torch.cat(of_blocks) for of_blocks in zip(*parts, strict=True)])

    def write(self, region: Region, out_Rv: Tensor, logits: Sequence[Tensor], rows_nR: Tensor, *settings: Any) -> None:
        for block in _blocks(out_Rv, self._elements(out_Rv)):
            out_Rv[block] = region([one[block] for one in logits], rows_nR[:, block], *settings)

    def _elements(self, logits_Rv: Tensor) -> int:
        return self.block_elements or BLOCK_ELEMENTS.get(logits_Rv.device.type, BLOCK_ELEMENTS_ELSEWHERE)


def _blocks(logits_Rv: Tensor, elements: int) -> list[slice]:
    """Slices of at most so many elements that cover the rows; one empty slice if there are none."""
    rows, columns = logits_Rv.shape
    size = max(1, elements // max(1, columns))
    return [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]


class Compiled:
    """torch.compile of the same regions. Numbers of rows and columns are symbolic: a new size compiles nothing."""

    def sums(self, region: Region, logits: Sequence[Tensor], rows_nR: Tensor | None, *settings: Any) -> Tensor:
        if not logits[0].numel():
            return Eager().sums(region, logits, rows_nR, *settings)
        return torch.stack(_compiled(region, "sums", settings)(logits, rows_nR))

    def write(self, region: Region, out_Rv: Tensor, logits: Sequence[Tensor], rows_nR: Tensor, *settings: Any) -> None:
        if not out_Rv.numel():
            return
        write = _compiled(region, "write", settings)
        if out_Rv is not logits[0]:
            write(logits, rows_nR, out_Rv)
        elif region in _BY_SCRATCH and out_Rv.dtype == torch.bfloat16 and out_Rv.device.type == "cpu":
            for block in _blocks(out_Rv, SCRATCH_ELEMENTS):
                scratch_Cv = torch.empty_like(out_Rv[block])
                write([one[block] for one in logits], rows_nR[:, block], scratch_Cv)
                out_Rv[block] = scratch_Cv
        else:
            _compiled(region, "overwrite", settings)(logits, rows_nR)


def use(name: Name) -> None:
    """Choose for this process, from now on.

    Raises:
        ValueError: there is no such backend, or it needs a package that is not installed.
    """
    global _backend
    if name not in get_args(Name.__value__):
        raise ValueError(f"losses backend {name!r}: must be one of {', '.join(get_args(Name.__value__))}")
    _backend = name, _make(name)


def current() -> Name:
    """The chosen backend's name."""
    return _backend[0]


def chosen() -> Backend:
    """The chosen backend."""
    return _backend[1]


def _make(name: Name) -> Backend:
    if name == "triton":
        if find_spec("triton") is None:
            raise ValueError("losses backend 'triton': the package triton is not installed; use 'compiled'")
        from megatron_distill.losses.triton_kernels import Triton

        return Triton()
    return Compiled() if name == "compiled" else Eager()


@cache
def _compiled(region: Region, how: str, settings: tuple[Any, ...]) -> Callable[..., Any]:
    """A region compiled for its settings.

    Every one counts its own recompilations: types and layouts of logits are few, settings may be many.
    """

    def sums(logits: Sequence[Tensor], rows_nR: Tensor | None) -> tuple[Tensor, ...]:
        return region(logits, rows_nR, *settings)

    def overwrite(logits: Sequence[Tensor], rows_nR: Tensor) -> None:
        logits[0].copy_(region(logits, rows_nR, *settings))

    def write(logits: Sequence[Tensor], rows_nR: Tensor, out_Rv: Tensor) -> None:
        out_Rv.copy_(region(logits, rows_nR, *settings))

    function = {"sums": sums, "overwrite": overwrite, "write": write}[how]
    return torch.compile(
        function, fullgraph=True, dynamic=True, isolate_recompiles=True, recompile_limit=32, options=_COMPILER
    )


_backend: tuple[Name, Backend] = ("eager", Eager())
