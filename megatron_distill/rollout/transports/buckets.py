"""A stream of tensors in pieces of bounded size, so that few calls move many small tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

type Named = tuple[str, Tensor]
"""A whole tensor and its Hugging Face name."""
type Bucket = list[Named]


def buckets(weights: Iterable[Named], most_bytes: int) -> Iterator[Bucket]:
    """Neighbours of the stream, at most `most_bytes` together; a larger tensor comes alone.

    The generator keeps nothing of a bucket that it has handed out.
    """
    stream = iter(weights)
    pending: Bucket = []
    held = 0
    for name, tensor in stream:
        if pending and held + tensor.nbytes > most_bytes:
            full, pending, held = pending, [], 0
            yield full
            del full
        pending.append((name, tensor))
        held += tensor.nbytes
        del tensor
    if pending:
        yield pending
