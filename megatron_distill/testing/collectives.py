"""Counting collectives: a loss that takes one more than it says waits for the network once more in every chunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor


@contextmanager
def counted(most_elements: int | None = None) -> Iterator[Counter[str]]:
    """Counts the calls of torch.distributed's collectives, by whichever module they are made; they do their work.

    Raises:
        AssertionError: one was handed a tensor of more than `most_elements`.
    """
    names = [
        *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single"),
        *("broadcast", "gather", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send", "recv"),
        *("barrier", "isend", "irecv", "batch_isend_irecv"),
    ]
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            calls[name] += 1
            largest = max((one.numel() for one in arguments if isinstance(one, Tensor)), default=0)
            assert most_elements is None or largest <= most_elements, f"{name} of {largest} elements"
            return originals[name](*arguments, **options)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
