"""How close is close: one measure and one table of tolerances for every parity test."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}
"""Largest accepted `relative_error` by the dtype of the arithmetic. Never raised without a written reason."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected| over the whole tensor; the plain error where `expected` is 0."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    error = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return error / scale if scale else error


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float | None = None) -> float:
    """Fail with a sentence unless `actual` is within the tolerance of its dtype; the error found.

    A NaN anywhere fails: it is not within any tolerance.
    """
    allowed = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = relative_error(actual, expected)
    assert error <= allowed, f"{what}: relative error {error:.3g}, allowed {allowed:.3g}"
    return error
