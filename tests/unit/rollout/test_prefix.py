"""How the teacher's part of a response shrinks over training."""

from __future__ import annotations

import pytest

from megatron_distill.rollout.prefix import prefix_length


def test_the_prefix_falls_along_a_cosine_from_the_longest_to_nothing() -> None:
    lengths = [prefix_length(step, 200, 8192) for step in range(201)]
    assert lengths[0] == 8192
    assert lengths[50] == round(8192 * (2 + 2**0.5) / 4)
    assert lengths[100] == 4096
    assert lengths[200] == 0
    assert lengths == sorted(lengths, reverse=True)
    assert all(abs(early + late - 8192) <= 1 for early, late in zip(lengths, lengths[::-1], strict=True))


def test_after_the_last_step_and_without_room_there_is_none() -> None:
    assert prefix_length(500, 200, 8192) == 0
    assert prefix_length(0, 1, 0) == 0
    assert prefix_length(0, 1, 7) == 7


@pytest.mark.parametrize(("step", "steps", "longest"), [(-1, 10, 10), (0, 0, 10), (0, 10, -1)])
def test_impossible_numbers_are_refused(step: int, steps: int, longest: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        prefix_length(step, steps, longest)
