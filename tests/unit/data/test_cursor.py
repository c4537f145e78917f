import pytest

from megatron_distill.data.cursor import Cursor
from megatron_distill.errors import CheckpointError


def indices(cursor: Cursor, count: int) -> list[int]:
    return [index for _, index in cursor.take(count)[0]]


def test_every_epoch_holds_every_prompt_once_in_a_new_order() -> None:
    walk = indices(Cursor(size=7, seed=3), 21)
    epochs = [walk[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_walk_does_not_depend_on_the_stride() -> None:
    cursor, walk = Cursor(size=7, seed=3), []
    for count in (1, 4, 9, 2):
        taken, cursor = cursor.take(count)
        walk += taken
    assert walk == Cursor(size=7, seed=3).take(16)[0]


def test_seeds_differ_and_unshuffled_is_file_order() -> None:
    assert indices(Cursor(size=50, seed=1), 50) != indices(Cursor(size=50, seed=2), 50)
    assert indices(Cursor(size=3, seed=1, shuffle=False), 5) == [0, 1, 2, 0, 1]


def test_resume_goes_on_where_it_stopped() -> None:
    _, cursor = Cursor(size=7, seed=3).take(5)
    resumed = Cursor(size=7, seed=3).restore(cursor.state())
    assert resumed.take(6) == cursor.take(6)
    with pytest.raises(CheckpointError, match="held 7 prompts, these are 8"):
        Cursor(size=8, seed=3).restore(cursor.state())
