"""The regions as Triton kernels for GPUs: each logit is read once per region, and a gradient may overwrite logits.

Sums run on a grid of rows x splits of the columns, so that few rows still fill a GPU; the splits of a row meet as the
columns of several ranks do. Maxima are found on the way: what has been summed relative to an older maximum is taken to
the new one. No atomics, so a result does not depend on the order of programs. fp64 runs eagerly.

What has been run, by tests/unit/losses/test_triton_kernels.py: every kernel in Triton's interpreter on a CPU, against
float64, and every kernel through Triton's compiler to machine code of an H100. The tests marked gpu have not been run:
no GPU was at hand, and nothing here has been timed.
"""

# Triton reads a kernel's annotations itself: only constants may have one.
# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_distill.losses import backend, regions
from megatron_distill.losses.regions import Region

BLOCK = 4096
"""Columns that a program holds at a time; more would spill out of registers."""
WARPS = 8
PROGRAMS = 1024
"""Programs that keep a large GPU busy; fewer rows than that are split."""

_LOWEST = tl.constexpr(regions.LOWEST)
_EMPTY = tl.constexpr(torch.finfo(torch.float32).min)
_NAMES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "mixed_kl",
    "total_variation",
)


@triton.jit
def _scaled(row, columns, width, scale):
    return tl.load(row + columns, mask=columns < width, other=float("-inf")).to(tl.float32) * scale


@triton.jit
def _shifted(scaled, top):
    return tl.maximum(scaled - top, _LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _below(older, newer):
    return tl.maximum(older - newer, _LOWEST)


@triton.jit
def _log_mixture_over_student(ratio, beta):
    less = tl.exp(-tl.abs(ratio)) - 1.0
    weight = tl.where(ratio > 0, 1.0 - beta, beta)
    return tl.log(1.0 + weight * less) + tl.maximum(ratio, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _entry(q, p, ratio, parameter, KIND: tl.constexpr):
    """`pointwise.ENTRIES`: the entry and its slope less c q."""
    if KIND == 0:
        entry = p * ratio
        slope = -p
    elif KIND == 1:
        entry = -q * ratio
        slope = entry
    elif KIND == 2:
        over = _log_mixture_over_student(ratio, parameter)
        slope = (parameter - 1.0) * q * over
        entry = parameter * p * (ratio - over) + slope
    elif KIND == 3:
        under = ratio - _log_mixture_over_student(ratio, parameter)
        entry = p * under
        slope = (parameter - 1.0) * q * (tl.exp(under) - 1.0)
    elif KIND == 4:
        over = _log_mixture_over_student(ratio, 1.0 - parameter)
        entry = -q * over
        slope = -q * (over + parameter * (tl.exp(-over) - 1.0))
    elif KIND == 5:
        reverse = (parameter - 1.0) * q * ratio
        entry = parameter * p * ratio + reverse
        slope = reverse - parameter * p
    else:
        entry = 0.5 * tl.abs(q - p)
        slope = 0.5 * q * (tl.where(q > p, 1.0, 0.0) - tl.where(q < p, 1.0, 0.0))
    return entry, slope


@triton.jit
def _bounded(entry, low, high, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr):
    bounded = entry
    if HAS_LOW:
        bounded = tl.maximum(bounded, low, propagate_nan=tl.PropagateNan.ALL)
    if HAS_HIGH:
        bounded = tl.minimum(bounded, high, propagate_nan=tl.PropagateNan.ALL)
    return bounded


@triton.jit
def _model_sums(logits, out, rows, width, stride, scale, span, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    top = tl.full((), _EMPTY, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    cross = total
    end = tl.minimum((split + 1) * span, width)
    for start in range(split * span, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        scaled = _scaled(logits + row.to(tl.int64) * stride, columns, end, scale)
        newer = tl.maximum(top, tl.max(scaled, 0))
        down = _below(top, newer)
        cross = (cross + total * down) * tl.exp(down)
        total = total * tl.exp(down)
        top = newer
        shifted = _shifted(scaled, top)
        total += tl.sum(tl.exp(shifted), 0)
        if ENTROPY:
            cross += tl.sum(tl.exp(shifted) * shifted, 0)
    place = out + split * rows + row
    tl.store(place, top)
    tl.store(place + splits * rows, total)
    if ENTROPY:
        tl.store(place + 2 * splits * rows, cross)


@triton.jit
def _pair_sums(student, teacher, out, rows, width, q_stride, p_stride, q_scale, p_scale, span, BLOCK: tl.constexpr):
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    q_top = tl.full((), _EMPTY, tl.float32)
    p_top = q_top
    q_total = tl.full((), 0.0, tl.float32)
    p_total, forward, reverse = q_total, q_total, q_total
    end = tl.minimum((split + 1) * span, width)
    for start in range(split * span, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        q_scaled = _scaled(student + row.to(tl.int64) * q_stride, columns, end, q_scale)
        p_scaled = _scaled(teacher + row.to(tl.int64) * p_stride, columns, end, p_scale)
        q_newer, p_newer = tl.maximum(q_top, tl.max(q_scaled, 0)), tl.maximum(p_top, tl.max(p_scaled, 0))
        q_down, p_down = _below(q_top, q_newer), _below(p_top, p_newer)
        q_shift = tl.where(q_top == _EMPTY, 0.0, q_down)
        shift = tl.where(p_top == _EMPTY, 0.0, p_down) - q_shift
        forward = (forward + p_total * shift) * tl.exp(p_down)
        reverse = (reverse - q_total * shift) * tl.exp(q_down)
        q_total, p_total = q_total * tl.exp(q_down), p_total * tl.exp(p_down)
        q_top, p_top = q_newer, p_newer
        q_shifted, p_shifted = _shifted(q_scaled, q_top), _shifted(p_scaled, p_top)
        q_exp, p_exp, ratio = tl.exp(q_shifted), tl.exp(p_shifted), p_shifted - q_shifted
        q_total += tl.sum(q_exp, 0)
        p_total += tl.sum(p_exp, 0)
        forward += tl.sum(p_exp * ratio, 0)
        reverse -= tl.sum(q_exp * ratio, 0)
    place, step = out + split * rows + row, splits * rows
    tl.store(place, q_top)
    tl.store(place + step, p_top)
    tl.store(place + 2 * step, q_total)
    tl.store(place + 3 * step, p_total)
    tl.store(place + 4 * step, forward)
    tl.store(place + 5 * step, reverse)


@triton.jit
def _entry_sums(
    student,
    teacher,
    numbers,
    out,
    rows,
    width,
    q_stride,
    p_stride,
    q_scale,
    p_scale,
    span,
    parameter,
    low,
    high,
    KIND: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    q_top, p_top = tl.load(numbers + row), tl.load(numbers + rows + row)
    q_inverse, p_inverse = tl.load(numbers + 2 * rows + row), tl.load(numbers + 3 * rows + row)
    offset = tl.load(numbers + 4 * rows + row)
    value = tl.full((), 0.0, tl.float32)
    slopes, inactive = value, value
    end = tl.minimum((split + 1) * span, width)
    for start in range(split * span, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        q_shifted = _shifted(_scaled(student + row.to(tl.int64) * q_stride, columns, end, q_scale), q_top)
        p_shifted = _shifted(_scaled(teacher + row.to(tl.int64) * p_stride, columns, end, p_scale), p_top)
        q, p = tl.exp(q_shifted) * q_inverse, tl.exp(p_shifted) * p_inverse
        entry, slope = _entry(q, p, p_shifted - q_shifted + offset, parameter, KIND)
        bounded = _bounded(entry, low, high, HAS_LOW, HAS_HIGH)
        value += tl.sum(tl.where(columns < end, bounded, 0.0), 0)
        slopes += tl.sum(tl.where(bounded == entry, slope, 0.0), 0)
        inactive += tl.sum(tl.where(bounded == entry, 0.0, q), 0)
    place, step = out + split * rows + row, splits * rows
    tl.store(place, value)
    tl.store(place + step, slopes)
    tl.store(place + 2 * step, inactive)


@triton.jit
def _entry_gradient(
    student,
    teacher,
    numbers,
    out,
    rows,
    width,
    q_stride,
    p_stride,
    out_stride,
    q_scale,
    p_scale,
    parameter,
    low,
    high,
    constant,
    KIND: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q_top, p_top = tl.load(numbers + row), tl.load(numbers + rows + row)
    q_inverse, p_inverse = tl.load(numbers + 2 * rows + row), tl.load(numbers + 3 * rows + row)
    offset, factor = tl.load(numbers + 4 * rows + row), tl.load(numbers + 5 * rows + row)
    total = tl.load(numbers + 6 * rows + row)
    q_shifted = _shifted(_scaled(student + row.to(tl.int64) * q_stride, columns, width, q_scale), q_top)
    p_shifted = _shifted(_scaled(teacher + row.to(tl.int64) * p_stride, columns, width, p_scale), p_top)
    q, p = tl.exp(q_shifted) * q_inverse, tl.exp(p_shifted) * p_inverse
    entry, slope = _entry(q, p, p_shifted - q_shifted + offset, parameter, KIND)
    active = _bounded(entry, low, high, HAS_LOW, HAS_HIGH) == entry
    if HAS_LOW or HAS_HIGH:
        slope = tl.where(active, slope, -constant * q)
    gradient = (slope - q * total) * factor
    place = out + row.to(tl.int64) * out_stride + columns
    tl.store(place, gradient.to(out.dtype.element_ty), mask=columns < width)


@triton.jit
def _kl_gradient(
    student,
    teacher,
    numbers,
    out,
    rows,
    width,
    q_stride,
    p_stride,
    out_stride,
    q_scale,
    p_scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q_top, p_top = tl.load(numbers + row), tl.load(numbers + rows + row)
    a, c = tl.load(numbers + 2 * rows + row), tl.load(numbers + 3 * rows + row)
    b, mean = tl.load(numbers + 4 * rows + row), tl.load(numbers + 5 * rows + row)
    q_shifted = _shifted(_scaled(student + row.to(tl.int64) * q_stride, columns, width, q_scale), q_top)
    p_shifted = _shifted(_scaled(teacher + row.to(tl.int64) * p_stride, columns, width, p_scale), p_top)
    gradient = tl.exp(q_shifted) * ((q_shifted - p_shifted - mean) * b + a) - tl.exp(p_shifted) * c
    place = out + row.to(tl.int64) * out_stride + columns
    tl.store(place, gradient.to(out.dtype.element_ty), mask=columns < width)


@triton.jit
def _softmax_gradient(
    logits, numbers, out, rows, width, stride, out_stride, scale, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    shifted = _shifted(_scaled(logits + row.to(tl.int64) * stride, columns, width, scale), tl.load(numbers + row))
    factor = tl.load(numbers + rows + row)
    if ENTROPY:
        gradient = tl.exp(shifted) * (shifted * tl.load(numbers + 2 * rows + row) + factor)
    else:
        gradient = tl.exp(shifted) * factor
    place = out + row.to(tl.int64) * out_stride + columns
    tl.store(place, gradient.to(out.dtype.element_ty), mask=columns < width)


@dataclass(frozen=True, slots=True)
class Triton:
    """See `backend.Backend`."""

    def sums(self, region: Region, logits: Sequence[Tensor], rows_nR: Tensor | None, *settings: Any) -> Tensor:
        if not _suited(logits):
            return backend.Eager().sums(region, logits, rows_nR, *settings)
        return _SUMS[region](logits, rows_nR, *settings)

    def write(self, region: Region, out_Rv: Tensor, logits: Sequence[Tensor], rows_nR: Tensor, *settings: Any) -> None:
        if not _suited([*logits, out_Rv]):
            backend.Eager().write(region, out_Rv, logits, rows_nR, *settings)
            return
        _WRITES[region](out_Rv, logits, rows_nR.float().contiguous(), *settings)


def _suited(logits: Sequence[Tensor]) -> bool:
    return all(one.numel() and one.stride(-1) == 1 and one.dtype != torch.float64 for one in logits)


def _grid(logits_Rv: Tensor) -> tuple[int, int, int]:
    """Rows, splits, and columns of a split, a multiple of the block."""
    rows, width = logits_Rv.shape
    blocks = triton.cdiv(width, BLOCK)
    splits = max(1, min(blocks, triton.cdiv(PROGRAMS, rows)))
    span = triton.cdiv(blocks, splits) * BLOCK
    return rows, triton.cdiv(width, span), span


def _run_model_sums(logits: Sequence[Tensor], _: None, scale: float, with_entropy: bool) -> Tensor:
    (one,) = logits
    rows, splits, span = _grid(one)
    out = one.new_empty((3 if with_entropy else 2, splits, rows), dtype=torch.float32)
    _model_sums[rows, splits](
        one, out, rows, one.shape[1], one.stride(0), scale, span, ENTROPY=with_entropy, BLOCK=BLOCK, num_warps=WARPS
    )
    top = out[0].amax(0)
    down = (out[0] - top).clamp_(min=regions.LOWEST)
    sums = [top, (out[1] * down.exp()).sum(0)]
    if with_entropy:
        sums.append(((out[2] + out[1] * down) * down.exp()).sum(0))
    return torch.stack(sums)


def _run_pair_sums(
    logits: Sequence[Tensor], _: None, q_scale: float, p_scale: float, forward: bool, reverse: bool
) -> Tensor:
    student, teacher = logits
    rows, splits, span = _grid(student)
    out = student.new_empty((6, splits, rows), dtype=torch.float32)
    strides = student.stride(0), teacher.stride(0)
    _pair_sums[rows, splits](
        student, teacher, out, rows, student.shape[1], *strides, q_scale, p_scale, span, BLOCK=BLOCK, num_warps=WARPS
    )
    tops = out[:2].amax(1)
    down = (out[:2] - tops[:, None]).clamp_(min=regions.LOWEST)
    q_shift, p_shift = down.masked_fill(out[:2] == torch.finfo(torch.float32).min, 0.0)
    shift, (q_weight, p_weight) = p_shift - q_shift, down.exp()
    sums = [*tops, (out[2] * q_weight).sum(0), (out[3] * p_weight).sum(0)]
    if forward:
        sums.append(((out[4] + out[3] * shift) * p_weight).sum(0))
    if reverse:
        sums.append(((out[5] - out[2] * shift) * q_weight).sum(0))
    return torch.stack(sums)


def _run_entry_sums(
    logits: Sequence[Tensor],
    rows_nR: Tensor,
    q_scale: float,
    p_scale: float,
    name: str,
    parameter: float,
    low: float | None,
    high: float | None,
) -> Tensor:
    student, teacher = logits
    rows, splits, span = _grid(student)
    out = student.new_empty((3, splits, rows), dtype=torch.float32)
    strides = student.stride(0), teacher.stride(0)
    _entry_sums[rows, splits](
        student,
        teacher,
        rows_nR.float().contiguous(),
        out,
        rows,
        student.shape[1],
        *strides,
        q_scale,
        p_scale,
        span,
        parameter,
        *_bounds(low, high),
        KIND=_NAMES.index(name),
        HAS_LOW=low is not None,
        HAS_HIGH=high is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return out.sum(1)[: 2 if low is None and high is None else 3].contiguous()


def _run_jsd_sums(logits: Sequence[Tensor], rows_nR: Tensor, q_scale: float, p_scale: float, beta: float) -> Tensor:
    """As entries, with p and q unnormalised: the value is beta times the first sum plus the slopes' sum."""
    ones = torch.ones_like(rows_nR[0])
    rows = torch.stack([*rows_nR[:2], ones, ones, rows_nR[2]])
    value_R, slope_R = _run_entry_sums(logits, rows, q_scale, p_scale, "jsd", beta, None, None)
    return torch.stack([(value_R - slope_R) / beta, slope_R / (beta - 1.0)])


def _run_entry_gradient(
    out_Rv: Tensor,
    logits: Sequence[Tensor],
    rows_nR: Tensor,
    q_scale: float,
    p_scale: float,
    name: str,
    parameter: float,
    low: float | None,
    high: float | None,
) -> None:
    student, teacher = logits
    rows, width = out_Rv.shape
    _entry_gradient[rows, triton.cdiv(width, BLOCK)](
        student,
        teacher,
        rows_nR,
        out_Rv,
        rows,
        width,
        student.stride(0),
        teacher.stride(0),
        out_Rv.stride(0),
        q_scale,
        p_scale,
        parameter,
        *_bounds(low, high),
        regions.ENTRIES[name][1](parameter),
        KIND=_NAMES.index(name),
        HAS_LOW=low is not None,
        HAS_HIGH=high is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def _run_jsd_gradient(
    out_Rv: Tensor, logits: Sequence[Tensor], rows_nR: Tensor, q_scale: float, p_scale: float, beta: float
) -> None:
    """exp(s_q) f (mean - log(m/q)) is (slope - q total) F with F = f / (1-beta), total = -(1-beta) mean."""
    ones = torch.ones_like(rows_nR[0])
    factor_R, total_R = rows_nR[3] / (1.0 - beta), (beta - 1.0) * rows_nR[4]
    rows = torch.stack([*rows_nR[:2], ones, ones, rows_nR[2], factor_R, total_R])
    _run_entry_gradient(out_Rv, logits, rows, q_scale, p_scale, "jsd", beta, None, None)


def _run_kl_gradient(
    out_Rv: Tensor,
    logits: Sequence[Tensor],
    rows_nR: Tensor,
    q_scale: float,
    p_scale: float,
    forward: bool,
    reverse: bool,
) -> None:
    student, teacher = logits
    rows, width = out_Rv.shape
    strides = student.stride(0), teacher.stride(0), out_Rv.stride(0)
    _kl_gradient[rows, triton.cdiv(width, BLOCK)](
        student, teacher, rows_nR, out_Rv, rows, width, *strides, q_scale, p_scale, BLOCK=BLOCK, num_warps=WARPS
    )


def _run_softmax_gradient(
    out_Rv: Tensor, logits: Sequence[Tensor], rows_nR: Tensor, scale: float, with_entropy: bool
) -> None:
    rows, width = out_Rv.shape
    strides = logits[0].stride(0), out_Rv.stride(0)
    _softmax_gradient[rows, triton.cdiv(width, BLOCK)](
        logits[0], rows_nR, out_Rv, rows, width, *strides, scale, ENTROPY=with_entropy, BLOCK=BLOCK, num_warps=WARPS
    )


def _bounds(low: float | None, high: float | None) -> tuple[float, float]:
    """Numbers for the kernel, which does not look at one that is not there."""
    return low or 0.0, high or 0.0


_SUMS: dict[Region, Callable[..., Tensor]] = {
    regions.model_sums: _run_model_sums,
    regions.pair_sums: _run_pair_sums,
    regions.entry_sums: _run_entry_sums,
    regions.jsd_sums: _run_jsd_sums,
}
_WRITES: dict[Region, Callable[..., None]] = {
    regions.softmax_gradient: _run_softmax_gradient,
    regions.kl_gradient: _run_kl_gradient,
    regions.jsd_gradient: _run_jsd_gradient,
    regions.entry_gradient: _run_entry_gradient,
}
