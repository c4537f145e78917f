"""A file is there whole or not at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_distill.files import write_atomically


def test_text_and_pieces_are_written_into_a_new_folder(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b.txt", "Ünï\n")
    write_atomically(tmp_path / "a" / "c.jsonl", (f"{number}\n" for number in range(3)))
    assert (tmp_path / "a" / "b.txt").read_bytes() == "Ünï\n".encode()
    assert (tmp_path / "a" / "c.jsonl").read_text() == "0\n1\n2\n"
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"b.txt", "c.jsonl"}


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    def pieces() -> Iterator[str]:
        yield "new\n"
        raise RuntimeError("cut off")

    path = tmp_path / "step.json"
    path.write_text("old\n")
    with pytest.raises(RuntimeError, match="cut off"):
        write_atomically(path, pieces())
    assert path.read_text() == "old\n"
