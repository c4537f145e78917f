"""Load a part by its file name: `objective.kind: gkd` is `megatron_distill/objectives/gkd.py`. There is no registry."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from difflib import get_close_matches

from megatron_distill.errors import ConfigError


def kinds(package: str) -> list[str]:
    """The names that may stand in `kind:`; every public module of `package` but `base`."""
    found = importlib.import_module(package)
    return sorted(
        module.name
        for module in pkgutil.iter_modules(found.__path__)
        if module.name != "base" and not module.name.startswith("_") and not module.ispkg
    )


def load[Part](package: str, kind: str, base: type[Part]) -> type[Part]:
    """The one subclass of `base` that the module `package.kind` defines.

    Raises:
        ConfigError: no module of that name; the message lists those there are.
    """
    allowed = kinds(package)
    if kind not in allowed:
        near = get_close_matches(kind, allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"kind={kind!r}: no such part in {package}; allowed: {', '.join(allowed)}{hint}")
    module = importlib.import_module(f"{package}.{kind}")
    parts = [
        part
        for part in vars(module).values()
        if inspect.isclass(part) and issubclass(part, base) and part.__module__ == module.__name__
    ]
    assert len(parts) == 1, f"{module.__name__} must define exactly one {base.__name__}, found {parts}"
    return parts[0]
