"""Every field of every section, from the docstrings of the parts: for `--help`, and as a JSON Schema for editors."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Collection, Iterator
from types import UnionType
from typing import Any, Literal, TypeAliasType, get_args, get_origin, get_type_hints

from pydantic.json_schema import models_json_schema

from megatron_distill import plugins
from megatron_distill.config.read import Parts, dataclass_in, inner_kinds, model
from megatron_distill.config.run import PARTS, RunConfig

WORDS = {str: "text", int: "int", float: "float", bool: "true | false", type(None): "null"}


def reference(width: int = 110) -> str:
    """One paragraph per field: path, what may stand there, default, meaning."""
    indent = " " * 4
    paragraphs = [
        [head.rstrip(), *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)]
        for head, text in _sections()
    ]
    return "".join("\n".join(lines) + "\n" for lines in paragraphs)


def schema() -> dict[str, Any]:
    """The JSON Schema of a config file; a part is one of its kinds. Nothing is required: a base file may give it."""
    docs = attribute_docs(RunConfig)
    hints = get_type_hints(RunConfig)
    fixed = {name: section for name in docs if name not in PARTS and (section := dataclass_in(hints[name]))}
    inner = [parts for outer in PARTS.values() for parts in outer.inner.values()]
    classes = [part for parts in [*PARTS.values(), *inner] for part in _kinds(parts).values()]
    refs, defs = _definitions([*fixed.values(), *dict.fromkeys(classes)])
    for body in defs.values():
        body.pop("required", None)
    sections: dict[str, Any] = {name: {"$ref": refs[section]} for name, section in fixed.items()}
    for name, parts in PARTS.items():
        one_of = _one_of(parts, refs, defs)
        sections[name] = {"type": "object", "additionalProperties": one_of} if parts.named else one_of
    base = {"type": ["array", "string"], "items": {"type": "string"}, "description": "Config files to build on."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "megatron-distill run",
        "type": "object",
        "additionalProperties": False,
        "properties": {"base": base, **{name: {"description": docs[name], **sections[name]} for name in docs}},
        "$defs": defs,
    }


def _one_of(parts: Parts, refs: dict[type, str], defs: dict[str, Any], default: str = "") -> dict[str, Any]:
    """Any of the kinds; their definitions get a `kind`, which only the default one may leave out."""
    for kind, part in _kinds(parts).items():
        body = defs[refs[part].rpartition("/")[2]]
        body |= {"properties": {"kind": {"const": kind}, **body.get("properties", {})}}
        body |= {} if kind == default else {"required": ["kind"]}
        for name, usual in inner_kinds(parts, part).items():
            text = {"description": attribute_docs(part)[name]}
            body["properties"][name] = text | _one_of(parts.inner[name], refs, defs, usual)
    return {"oneOf": [{"$ref": refs[part]} for part in _kinds(parts).values()]}


def attribute_docs(section: type) -> dict[str, str]:
    """The docstrings that stand below the fields of a dataclass and its bases."""
    docs: dict[str, str] = {}
    for part in reversed(section.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def _definitions(classes: list[type]) -> tuple[dict[type, str], dict[str, Any]]:
    """A reference to each class, and all definitions; in one go, so that two classes of one name keep apart."""
    found, schemas = models_json_schema([(model(section), "validation") for section in classes])
    defs = schemas["$defs"]
    wrappers = {section: found[model(section), "validation"]["$ref"].rpartition("/")[2] for section in classes}
    refs = {section: defs[wrapper]["properties"]["value"]["$ref"] for section, wrapper in wrappers.items()}
    return refs, {name: body for name, body in defs.items() if name not in wrappers.values()}


def _sections() -> Iterator[tuple[str, str]]:
    """(head, text) of each section, kind and field."""
    docs = attribute_docs(RunConfig)
    told: dict[Any, str] = {}
    for name, hint in get_type_hints(RunConfig).items():
        yield f"\n{name}", docs[name]
        if name not in PARTS:
            yield from _fields(dataclass_in(hint), name, told)
            continue
        yield from _parts(PARTS[name], f"{name}.NAME" if PARTS[name].named else name, told)


def _parts(parts: Parts, path: str, told: dict[Any, str]) -> Iterator[tuple[str, str]]:
    """Every kind; what one holds that has kinds of its own is told after it, the first time that it is met."""
    for kind, part in _kinds(parts).items():
        yield f"\n{path}.kind = {kind}", (inspect.getdoc(part) or "").partition("\n\n")[0]
        yield from _fields(part, path, told, inner_kinds(parts, part))
        for name in inner_kinds(parts, part):
            if parts.inner[name].base not in told:
                told[parts.inner[name].base] = f"{path}.{name}"
                yield from _parts(parts.inner[name], f"{path}.{name}", told)


def _fields(
    section: type | None, path: str, told: dict[Any, str], parts: Collection[str] = ()
) -> Iterator[tuple[str, str]]:
    """A class met before is not told again, nor here what is in a field that holds one of several `parts`."""
    assert section is not None
    told.setdefault(section, path)
    docs, hints = attribute_docs(section), get_type_hints(section)
    for field in dataclasses.fields(section):
        here, inner = f"{path}.{field.name}", dataclass_in(hints[field.name])
        again = f" Fields as in `{told[inner]}`." if inner in told else ""
        yield f"{here}  {words(hints[field.name])}{_default(field)}", docs.get(field.name, "") + again
        if inner and not again and field.name not in parts:
            yield from _fields(inner, here, told)


def words(hint: Any) -> str:
    """What may stand in YAML for a type hint."""
    if isinstance(hint, TypeAliasType):
        return words(hint.__value__)
    if hint in WORDS:
        return WORDS[hint]
    origin, members = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(str(member) for member in members)
    if origin is UnionType:
        return " | ".join(words(member) for member in members)
    if origin in (tuple, list):
        return f"list of {words(members[0])}"
    if origin is not None or dataclasses.is_dataclass(hint):
        return "mapping"
    return str(hint.__name__).lower()


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "  (required)"
    return "" if dataclasses.is_dataclass(value) else f" = {json.dumps(value, default=str)}".replace('"', "")


def _kinds(parts: Parts) -> dict[str, type]:
    return {kind: plugins.load(parts.package, kind, parts.base) for kind in plugins.kinds(parts.package)}
