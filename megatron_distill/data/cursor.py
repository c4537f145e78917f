"""Which prompts come next: a pure function of the seed and of how many were handed out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_distill.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """A place in an endless walk through `size` prompts, newly shuffled in every epoch."""

    size: int
    seed: int
    shuffle: bool = True
    position: int = 0
    """Prompts handed out so far, over all epochs."""

    def index(self, position: int) -> int:
        """The prompt at a place of the walk."""
        epoch, place = divmod(position, self.size)
        return int(_order(self.size, self.seed, epoch)[place]) if self.shuffle else place

    def take(self, count: int) -> tuple[list[tuple[int, int]], Cursor]:
        """The next `count` (position, prompt index), and the cursor after them."""
        positions = range(self.position, self.position + count)
        return [(position, self.index(position)) for position in positions], replace(
            self, position=self.position + count
        )

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"position": self.position, "size": self.size}

    def restore(self, state: Mapping[str, int]) -> Cursor:
        """This walk at a saved place.

        Raises:
            CheckpointError: the data set has another number of prompts than the saved one.
        """
        if state["size"] != self.size:
            raise CheckpointError(
                f"the checkpoint's data held {state['size']} prompts, these are {self.size}; "
                "resume with the same data, or start a new run from the exported model"
            )
        return replace(self, position=state["position"])


@lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch])).permutation(size)
