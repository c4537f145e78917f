"""`config CONFIG`: the resolved tree and what its checks say; starts nothing."""

from __future__ import annotations

import argparse
import json
from typing import Any

from megatron_distill.cli.arguments import add_config, add_verb
from megatron_distill.errors import ConfigError


def add_to(verbs: Any) -> None:
    """Describe the verb."""
    parser = add_verb(verbs, "config", "print a config as it is read, defaults included, and check it", run)
    add_config(parser, needed=False)
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of config files, for editors")


def run(chosen: argparse.Namespace) -> int:
    """Print the tree even when a check fails."""
    from megatron_distill.config import check, dump, load, schema

    if chosen.schema:
        print(json.dumps(schema(), indent=2))
        return 0
    if chosen.config is None:
        raise ConfigError("config: name a config file, e.g. megatron-distill config configs/base.yaml, or --schema")
    run = load(chosen.config, chosen.overrides)
    print(dump(run), end="")
    check(run)
    print("# checks: all passed")
    return 0
