"""A stream of tensors in pieces of bounded size, so that few calls move many small tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

type Named = tuple[str, Tensor]
"""A whole tensor and its Hugging Face name."""
type Bucket = list[Named]

_FIRST = 4
"""Times smaller is the first bucket: nothing is under way while it is made."""


def buckets[T](stream: Iterable[T], most_bytes: int, bytes_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Neighbours of the stream, at most `most_bytes` together; what is larger comes alone.

    The first bucket holds a quarter of that at most. The generator keeps nothing of a bucket that it has handed out.
    """
    pending: list[T] = []
    held = 0
    most = most_bytes // _FIRST
    for one in stream:
        size = bytes_of(one)
        if pending and held + size > most:
            full, pending, held, most = pending, [], 0, most_bytes
            yield full
            del full
        pending.append(one)
        held += size
        del one
    if pending:
        yield pending
