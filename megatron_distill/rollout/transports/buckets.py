"""A stream of tensors in pieces of bounded size, so that few calls move many small tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

type Named = tuple[str, Tensor]
"""A whole tensor and its Hugging Face name."""
type Bucket = list[Named]


def buckets[T](stream: Iterable[T], most_bytes: int, bytes_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Neighbours of the stream, at most `most_bytes` together; what is larger comes alone.

    The generator keeps nothing of a bucket that it has handed out.
    """
    pending: list[T] = []
    held = 0
    for one in stream:
        size = bytes_of(one)
        if pending and held + size > most_bytes:
            full, pending, held = pending, [], 0
            yield full
            del full
        pending.append(one)
        held += size
        del one
    if pending:
        yield pending
