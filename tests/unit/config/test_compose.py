"""Files and overrides become one tree; every value remembers who set it."""

import pytest

from megatron_distill.config.compose import compose, parse
from megatron_distill.errors import ConfigError


@pytest.fixture
def configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        file = tmp_path / "configs" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return write


def values(name, *overrides):
    return compose(name, overrides).values


def test_bases_merge_left_to_right_and_the_file_has_the_last_word(configs):
    configs("one", "train: {steps: 1, seed: 1, size: 1}\nnames: [a, b]")
    configs("parts/two", "train: {steps: 2, seed: 2}\nnames: [c]")
    configs("run", "base: [one, parts/two]\ntrain: {steps: 3}")
    assert values("run") == {"train": {"steps": 3, "seed": 2, "size": 1}, "names": ["c"]}
    assert values("run", "train.steps=4", "names=[]") == {"train": {"steps": 4, "seed": 2, "size": 1}, "names": []}


def test_a_base_may_be_one_name_a_relative_path_or_have_bases_itself(configs):
    configs("a", "x: {a: 1}")
    configs("deep/b", "base: ../a\nx: {b: 2}")
    configs("deep/c", "base: b.yaml\nx: {c: 3}")
    assert values("deep/c") == {"x": {"a": 1, "b": 2, "c": 3}}


def test_a_file_reached_twice_does_not_undo_what_came_between(configs):
    configs("base", "x: {y: 1}")
    configs("model", "base: base\nx: {y: 2}")
    configs("objective", "base: base\nz: 1")
    configs("run", "base: [model, objective]")
    assert values("run") == {"x": {"y": 2}, "z": 1}


def test_a_part_of_another_kind_starts_afresh(configs):
    configs("base", "objective: {kind: gkd, beta: 0.3}\nteachers: {big: {kind: frozen, model: a}}")
    assert values("base", "objective={kind: opd}")["objective"] == {"kind": "opd"}
    assert values("base", "objective.kind=gkd")["objective"] == {"kind": "gkd", "beta": 0.3}
    assert values("base", "teachers.big.model=b")["teachers"] == {"big": {"kind": "frozen", "model": "b"}}


def test_bases_that_go_round_in_a_circle_are_named(configs):
    configs("a", "base: b")
    configs("b", "base: [c]")
    configs("c", "base: a")
    with pytest.raises(
        ConfigError, match=r"circle: configs/a\.yaml -> configs/b\.yaml -> configs/c\.yaml -> configs/a"
    ):
        compose("a")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 0.0003),
        ("1E5", 100000.0),
        ("-.5e+1", -5.0),
        ("12", 12),
        ("1.5", 1.5),
        ("2026-01-02", "2026-01-02"),
        ("true", True),
        ("none", "none"),
        ("null", None),
        ("", None),
        ("[1, 2]", [1, 2]),
        ("a/b e4", "a/b e4"),
    ],
)
def test_values_are_what_people_mean(text, value):
    assert parse(text, "here") == value
    assert type(parse(text, "here")) is type(value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("train:\n  steps: [1", r"run\.yaml:2: not valid YAML"),
        ("train: {a: 1, a: 2}", r"run\.yaml:1: .*'a' is given twice"),
        ("1: {a: 2}", r"run\.yaml:1: .*key 1 is no text; a name such as \"1\" needs quotes"),
        ("train:\n  {1: 2}", r"run\.yaml:2: .*key 1 is no text"),
        ("train: {a: 1, on: 2}", r"run\.yaml:1: .*key on is no text"),
        ("[1]", r"run\.yaml: must be a mapping of sections, got list"),
        ("base: 3", r"base=3: must be a list"),
        ("base: nowhere", r"run\.yaml: base: nowhere: no such config file"),
    ],
)
def test_a_broken_file_is_named(configs, text, complaint):
    configs("run", text)
    with pytest.raises(ConfigError, match=complaint):
        compose("run")


def test_a_file_that_is_not_utf_8_is_named(configs, tmp_path):
    configs("run", "")
    next(tmp_path.rglob("run.yaml")).write_bytes("train: {a: é}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml: not UTF-8 text \(byte 11\); save it as UTF-8$"):
        compose("run")


@pytest.mark.parametrize("word", ["train={1: 2}", "steps", "=1", "train..steps=1", "train.=1", "train.steps=[1"])
def test_a_broken_override_is_named(configs, word):
    configs("run", "")
    with pytest.raises(ConfigError, match="override"):
        compose("run", [word])


def test_every_value_remembers_who_set_it(configs):
    configs("base", "train: {steps: 1, seed: 1}")
    configs("run", "base: base\ntrain: {steps: 3}")
    tree = compose("run", ["train.size=4"])
    said = [tree.origin(("train", name)) for name in ("seed", "steps", "size", "other")]
    assert said == ["configs/base.yaml", "configs/run.yaml", "command line", ""]
