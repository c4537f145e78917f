"""`megatron-distill`: what a person types. An error a person can put right is one line, exit code 2, no traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_distill.cli import config, eval, ranks, train
from megatron_distill.errors import ConfigError, DistillError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints read like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code: 0 done, 2 something to put right, 130 stopped by Ctrl-C."""
    try:
        # known ones first: argparse takes no overrides after an option
        chosen, rest = _parser().parse_known_args(argv)
        if strange := [word for word in rest if word.startswith("-")]:
            raise ConfigError(f"{' '.join(strange)}: no such option; see --help")
        chosen.overrides += rest
        if getattr(chosen, "worker", None):
            ranks.become_worker(chosen.worker)
        return chosen.run(chosen)
    except DistillError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> Parser:
    parser = Parser(prog="megatron-distill", description="Distil large reasoning models with Megatron-Core.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in (train, eval, config):
        verb.add_to(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
