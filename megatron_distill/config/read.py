"""From a tree of plain values to typed sections and back; every complaint about a value is worded here.

Sections are the parts' own frozen dataclasses; pydantic checks them as strictly as JSON, so `"5"` is no number and
an unknown key is an error. A section whose class depends on its `kind` is loaded by file name.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args, get_type_hints

import pydantic
from pydantic_core import ErrorDetails

from megatron_distill import plugins
from megatron_distill.config.compose import Place, Tree
from megatron_distill.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """A section whose class is named by `kind:`."""

    package: str
    base: type
    named: bool = False
    """The section maps names to parts."""
    inner: Mapping[str, Parts] = dataclasses.field(default_factory=dict)
    """Fields of these parts that hold a part themselves; without a `kind` it is one of the field's default."""


def read[Root](root: type[Root], parts: Mapping[str, Parts], tree: Tree) -> Root:
    """A `root` dataclass from the tree; `parts` says which of its fields have a `kind`.

    Raises:
        ConfigError: one line for everything that is wrong, in the order of the sections.
    """
    fields = {section.name: section for section in dataclasses.fields(root)}  # type: ignore[arg-type]
    hints = get_type_hints(root)
    complaints = [_unknown((name,), tree.values[name], fields) for name in tree.values if name not in fields]
    sections: dict[str, Any] = {}
    for name, section in fields.items():
        raw = tree.values.get(name)
        if raw is None and _has_default(section):
            continue
        if raw is None and name in parts:
            complaints.append(_missing((name,), plugins.kinds(parts[name].package)))
            continue
        sections[name], wrong = _section(name, {} if raw is None else raw, parts.get(name), hints[name])
        complaints += wrong
    if complaints:
        raise ConfigError("\n".join(complaint.line(tree, root) for complaint in complaints))
    return root(**sections)


def write(run: Any, parts: Mapping[str, Parts]) -> dict[str, Any]:
    """The plain values of a run, defaults included; `read` gives the same run back."""
    tree: dict[str, Any] = {}
    for section in dataclasses.fields(run):
        value = getattr(run, section.name)
        kind = parts.get(section.name)
        if kind and kind.named:
            tree[section.name] = {name: _plain(part, kind) for name, part in value.items()}
        else:
            tree[section.name] = None if value is None else _plain(value, kind)
    return tree


def kind_of(part: Any) -> str:
    """The name that stands in `kind:` for a part: that of the file that defines it."""
    return type(part).__module__.rpartition(".")[2]


@cache
def model(section: type) -> type[pydantic.BaseModel]:
    """A pydantic model with one field, `value`, of this class; nested dataclasses inherit its strictness."""
    strict = pydantic.ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
    return pydantic.create_model(section.__name__, __config__=strict, value=(section, ...))


_NOTHING = object()


@dataclasses.dataclass(frozen=True, slots=True)
class _Complaint:
    place: Place
    problem: str
    value: Any = _NOTHING
    hint: str = ""
    allowed: tuple[str, ...] = ()
    """For an unknown key: the keys that are known there."""
    own_words: bool = False
    """The problem goes on where the path ends."""

    def line(self, tree: Tree, root: type) -> str:
        """Where, what was given, what is wrong with it, what to do, and which file said so."""
        given = "" if self.value is _NOTHING else f"={_short(self.value)}"
        hint = self._nearest(root) if self.allowed else self.hint
        origin = tree.origin(self.place)
        shown = f" ({origin})" if origin else ""
        path = ".".join(self.place)
        return f"{path}{given}{'' if self.own_words else ': '}{self.problem}{hint and f'; {hint}'}{shown}"

    def _nearest(self, root: type) -> str:
        """The same key in another section, else the most similar key here, else all keys here."""
        key = self.place[-1]
        for name, hint in get_type_hints(root).items():
            section = dataclass_in(hint)
            if section and key in {known.name for known in dataclasses.fields(section)} and name != self.place[0]:
                return f"did you mean '{name}.{key}'?"
        return _did_you_mean(key, list(self.allowed)) or f"allowed: {', '.join(self.allowed)}"


def _section(name: str, raw: Any, kind: Parts | None, hint: Any) -> tuple[Any, list[_Complaint]]:
    if kind is None:
        return _validate(dataclass_in(hint) or hint, raw, (name,))
    if not kind.named:
        return _part(kind, raw, (name,))
    if not isinstance(raw, Mapping):
        return None, [_Complaint((name,), "must be a mapping from names to parts", raw)]
    found = {key: _part(kind, value, (name, str(key))) for key, value in raw.items() if value is not None}
    return {key: part for key, (part, _) in found.items()}, [wrong for _, many in found.values() for wrong in many]


def _part(kind: Parts, raw: Any, place: Place) -> tuple[Any, list[_Complaint]]:
    if not isinstance(raw, Mapping):
        return None, [_Complaint(place, "must be a mapping with a `kind`", raw)]
    if not isinstance(raw.get("kind"), str):
        return None, [_missing((*place, "kind"), plugins.kinds(kind.package))]
    try:
        part: type = plugins.load(kind.package, raw["kind"], kind.base)
    except ConfigError as error:
        return None, [_Complaint((*place, "kind"), str(error).partition(": ")[2], raw["kind"])]
    values = {key: value for key, value in raw.items() if key != "kind"}
    inner, complaints = _inner_parts(kind, part, values, place)
    whole, wrong = _validate(part, {key: value for key, value in values.items() if key not in inner}, place)
    if complaints or wrong:
        return None, [*wrong, *complaints]
    return dataclasses.replace(whole, **inner), []


def _inner_parts(
    kind: Parts, part: type, values: Mapping[str, Any], place: Place
) -> tuple[dict[str, Any], list[_Complaint]]:
    """The parts that `values` give for fields of this part which hold one."""
    found: dict[str, Any] = {}
    complaints: list[_Complaint] = []
    for name, default in inner_kinds(kind, part).items():
        if name in values:
            raw = values[name]
            raw = {"kind": default, **raw} if isinstance(raw, Mapping) else raw
            found[name], wrong = _part(kind.inner[name], raw, (*place, name))
            complaints += wrong
    return found, complaints


def inner_kinds(kind: Parts, part: type) -> dict[str, str]:
    """The fields of a part that hold a part themselves, and the kind of each where none is named."""
    factories = {field.name: field.default_factory for field in dataclasses.fields(part)}
    return {name: kind_of(factories[name]()) for name in kind.inner if name in factories}  # type: ignore[misc]


def _validate(section: type, raw: Any, place: Place) -> tuple[Any, list[_Complaint]]:
    """Check as JSON, whose strictness is that of YAML: lists are tuples, text is a path, but "5" is no number."""
    try:
        return model(section).model_validate_json(json.dumps({"value": raw})).value, []  # type: ignore[attr-defined]
    except TypeError as error:
        return None, [_Complaint(place, f"holds something that is no plain value: {error}", raw)]
    except pydantic.ValidationError as error:
        return None, list(_complaints(error.errors(), section, raw, place))


def _complaints(errors: list[ErrorDetails], section: type, raw: Any, place: Place) -> Iterator[_Complaint]:
    """One complaint per place; a value that fits no member of a union makes pydantic speak several times."""
    problems: dict[Place, list[ErrorDetails]] = {}
    for error in errors:
        problems.setdefault(_inner(error, raw), []).append(error)
    for inner, many in problems.items():
        first = many[0]
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            yield _unknown((*place, *inner), first["input"], _fields_at(section, inner[:-1]))
        elif first["type"] == "missing":
            yield _missing((*place, *inner))
        elif first["type"] == "value_error":
            yield _refused((*place, *inner), _words(first), _fields_at(section, inner))
        else:
            problem = " or ".join(dict.fromkeys(_words(error) for error in many))
            yield _Complaint((*place, *inner), problem, first["input"], _did_you_mean(first["input"], _expected(first)))


def _inner(error: ErrorDetails, raw: Any) -> Place:
    """The error's location without pydantic's own words for members of unions."""
    place: list[str] = []
    for step in error["loc"][1:]:
        keys = range(len(raw)) if isinstance(raw, list) else raw if isinstance(raw, Mapping) else ()
        known = step in keys
        if known or error["type"] == "missing":
            place.append(str(step))
            raw = raw[step] if known else None
    return tuple(place)


def _words(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return message.replace("an object", "a mapping").replace("a valid array", "a list")


def _expected(error: ErrorDetails) -> list[str]:
    """The words a literal allows."""
    return re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))


def _unknown(place: Place, value: Any, allowed: Mapping[str, Any]) -> _Complaint:
    return _Complaint(place, "unknown key", value, allowed=tuple(allowed))


def _missing(place: Place, kinds: Sequence[str] = ()) -> _Complaint:
    choices = f"allowed kinds: {', '.join(kinds)}" if kinds else ""
    return _Complaint(place, "required, and not given", hint=choices)


def _refused(place: Place, message: str, fields: Mapping[str, Any]) -> _Complaint:
    """What a section's own check says, which may begin with the name of a field, or with its path or part of it."""
    for start in range(len(place)):
        message = message.removeprefix(".".join(place[start:]) + ".")
    name = re.match(r"\w*", message)[0]  # type: ignore[index]
    if name not in fields:
        return _Complaint(place, message)
    return _Complaint((*place, name), message.removeprefix(name), own_words=True)


def _did_you_mean(word: Any, allowed: list[str]) -> str:
    near = get_close_matches(str(word), allowed, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def dataclass_in(hint: Any) -> type | None:
    """The dataclass a hint speaks of, also behind `| None`."""
    found = [
        member for member in (hint, *get_args(hint)) if isinstance(member, type) and dataclasses.is_dataclass(member)
    ]
    return found[0] if found else None


def _fields_at(section: Any, inner: Place) -> dict[str, Any]:
    """The fields allowed at a place inside a section."""
    for name in inner:
        section = dataclass_in(get_type_hints(section).get(name)) if section else None
    return {found.name: found for found in dataclasses.fields(section)} if section else {}


def _has_default(section: dataclasses.Field[Any]) -> bool:
    return section.default is not dataclasses.MISSING or section.default_factory is not dataclasses.MISSING


def _plain(part: Any, kind: Parts | None) -> dict[str, Any]:
    section: type = type(part)
    values = model(section).model_construct(value=part).model_dump(mode="json")["value"]
    if kind is None:
        return values
    inner = {name: _plain(getattr(part, name), kind.inner[name]) for name in inner_kinds(kind, section)}
    return {"kind": kind_of(part), **values, **inner}


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."
