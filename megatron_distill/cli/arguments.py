"""Words that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

OVERRIDE = "section.field=value, read as YAML, on top of the file; e.g. train.steps=5 objective.kind=gkd"


class _Reference(argparse.Action):
    """`--help` of a verb that takes a config: usage, then every field of every section.

    An action, so that the sections are imported only by somebody who asks.
    """

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from megatron_distill.config import reference

        parser.print_help()
        print(f"\n{reference()}", end="")
        parser.exit()


def add_verb(verbs: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """A verb whose `--help` documents the config as well."""
    parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", add_help=False)
    parser.add_argument("-h", "--help", action=_Reference, nargs=0, help="show this, and every field of a config")
    parser.set_defaults(run=run)
    return parser


def add_config(parser: argparse.ArgumentParser, needed: bool = True) -> None:
    """CONFIG and overrides."""
    count = None if needed else "?"
    parser.add_argument("config", metavar="CONFIG", nargs=count, help="a YAML file, or its name under configs/")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help=OVERRIDE)


def add_worker(parser: argparse.ArgumentParser) -> None:
    """How the launcher tells a rank that everything is checked, and where to log; nobody types it."""
    parser.add_argument("--worker", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
