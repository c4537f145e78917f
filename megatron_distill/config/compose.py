"""From files and `a.b=c` words to one tree of plain values, remembering where each value came from.

A file names the files it builds on in `base:`; they are merged left to right, then the file itself, then the
overrides. A mapping merges into a mapping, anything else replaces, a list replaces a list, and a part whose `kind`
changes starts afresh. A file reached twice counts once, at its first place. Nothing here knows any section.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import megatron_distill
from megatron_distill.errors import ConfigError

type Place = tuple[str, ...]
"""A path into the tree, e.g. `("train", "steps")`."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Nested plain values and, by place, the file or override that set them."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Place, str] = field(default_factory=dict)

    def origin(self, place: Place) -> str:
        """What set this place, or the nearest place above it; empty when nothing did."""
        for end in range(len(place), 0, -1):
            if place[:end] in self.origins:
                return self.origins[place[:end]]
        return ""

    def merge(self, layer: Mapping[str, Any], origin: str) -> None:
        """Put a layer on top, in place."""
        _merge(self.values, layer)
        self.origins.update((place, origin) for place in _places(layer, ()))


def compose(config: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """The merged tree of a file, given by path or by name under `configs/`, and of overrides such as `train.steps=5`.

    Raises:
        ConfigError: a file that is missing, not YAML, not a mapping, or builds on itself; an override without `=`.
    """
    tree = Tree()
    seen: set[Path] = set()
    for path, layer in _layers(find(config, Path.cwd()), (), seen):
        tree.merge(layer, _shown(path))
    for word in overrides:
        tree.merge(_override(word), "command line")
    return tree


def find(name: str | Path, folder: Path) -> Path:
    """The file `name` means for somebody in `folder`: a path there, or a name under the nearest `configs/`.

    Raises:
        ConfigError: no such file; the message lists where it was looked for.
    """
    parents = [parent / "configs" for parent in (folder.resolve(), *folder.resolve().parents)]
    project = Path(megatron_distill.__file__).parent.parent / "configs"
    above = [parent for parent in folder.resolve().parents if parent.name == "configs"]
    places = [folder, *above, *(parent for parent in parents if parent.is_dir())]
    places = list(dict.fromkeys([*places, project]))
    for place in places:
        for path in (place / name, place / f"{name}.yaml"):
            if path.is_file():
                return path.resolve()
    looked = ", ".join(str(place) for place in places)
    raise ConfigError(f"{name}: no such config file, with or without .yaml; looked in {looked}")


def parse(text: str, origin: str) -> Any:
    """One YAML document as plain values.

    Raises:
        ConfigError: not YAML, or a key given twice; the message has the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `3e-4` is a number, a date is text, keys are text and given once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
        mapping = super().construct_mapping(node, deep)
        for key, _ in node.value:
            if not isinstance(self.construct_object(key), str):
                hint = f'key {key.value} is no text; a name such as "{key.value}" needs quotes'
                raise yaml.MarkedYAMLError(problem=hint, problem_mark=key.start_mark)
        return mapping


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # YAML 1.1 asks for a dot and a signed exponent; YAML 1.2 and people do not
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _layers(path: Path, chain: tuple[Path, ...], seen: set[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of a config in the order in which they are merged."""
    if path in chain:
        circle = " -> ".join(_shown(file) for file in (*chain[chain.index(path) :], path))
        raise ConfigError(f"base: goes round in a circle: {circle}")
    if path in seen:
        return
    seen.add(path)
    layer = parse(_text(path), _shown(path))
    layer = {} if layer is None else layer
    if not isinstance(layer, dict):
        raise ConfigError(f"{_shown(path)}: must be a mapping of sections, got {type(layer).__name__}")
    for name in _bases(layer.pop("base", None), path):
        try:
            base = find(name, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{_shown(path)}: base: {error}") from error
        yield from _layers(base, (*chain, path), seen)
    yield path, layer


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_shown(path)}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{_shown(path)}: cannot be read ({error.strerror})") from error


def _bases(value: Any, path: Path) -> list[str]:
    """The names in `base:`, which may be one name or a list."""
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{_shown(path)}: base={value!r}: must be a list of config files")
    return names


def _override(word: str) -> dict[str, Any]:
    """`a.b=c` as `{a: {b: c}}`."""
    path, equals, text = word.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{word!r}: not an override; write section.field=value, e.g. train.steps=5")
    value = parse(text, f"override {word!r}")
    for name in reversed(names):
        value = {name: value}
    return value


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        old = into.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict) and _same_kind(old, value):
            _merge(old, value)
        else:
            into[key] = _copy(value)


def _same_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" not in new or "kind" not in old or new["kind"] == old["kind"]


def _copy(value: Any) -> Any:
    return {key: _copy(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _places(values: Mapping[str, Any], above: Place) -> Iterator[Place]:
    for key, value in values.items():
        place = (*above, str(key))
        if isinstance(value, Mapping) and value:
            yield from _places(value, place)
        else:
            yield place


def _shown(path: Path) -> str:
    """A path as people would type it from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
