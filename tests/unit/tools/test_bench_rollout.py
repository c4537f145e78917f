"""The bench of the client gives the same load to everybody, and tells what it saw."""

from __future__ import annotations

import json
from pathlib import Path

from tools.bench.rollout import BARE, CLIENT, Load, describe, forget_the_end


def test_a_load_is_the_same_every_time_and_within_the_vocabulary() -> None:
    load = Load(requests=5, in_flight=2, prompt_tokens=7, new_tokens=11)
    made = load.make(100)
    assert made == load.make(100)
    assert load.tokens == 55
    assert {len(request.tokens) for request in made} == {7}
    assert all(3 <= token < 100 and type(token) is int for request in made for token in request.tokens)


def test_a_model_without_an_end_keeps_everything_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2, "vocab_size": 9}), encoding="utf-8")
    forget_the_end(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == {"vocab_size": 9}


def test_a_missed_bar_is_said() -> None:
    found = {"tokens_per_s": {CLIENT: 90, BARE: 100}, "share_of_ceiling": 0.9, "bar": 0.95, "passed": False}
    assert describe(found) == (
        "client 90 tokens/s, bare loop 100 tokens/s: 0.900 of the server's ceiling (bar 0.95): MISSED"
    )
