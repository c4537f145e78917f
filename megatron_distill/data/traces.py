"""Recorded rollouts on disk: one JSON Lines file per step, one rollout per line, exact to the last bit.

A step's file appears whole or not at all, and a resumed run that comes to a step again replaces it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_distill.data.rows import Row, json_lines
from megatron_distill.errors import DataError
from megatron_distill.files import write_atomically
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop


def trace_file(folder: Path, step: int) -> Path:
    """Where a step's rollouts lie."""
    return Path(folder) / f"step_{step:06d}.jsonl"


def write_traces(folder: Path, step: int, scored: Iterable[Scored]) -> Path:
    """Write all rollouts of a step; atomic, call it on one rank."""
    final = trace_file(folder, step)
    write_atomically(final, (json.dumps(_record(one, step), ensure_ascii=False) + "\n" for one in scored))
    return final


def read_traces(path: Path) -> dict[int, list[Scored]]:
    """By step, the rollouts of one file, or of all step files in a folder.

    Raises:
        DataError: nothing there, or a line that is broken, cut off or lacks a field, with file and line.
    """
    path = Path(path)
    files = sorted(path.glob("step_*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"{path}: no recorded rollouts; expected step_NNNNNN.jsonl, as rollout.record=true writes them")
    steps: dict[int, list[Scored]] = {}
    for file in files:
        for row in json_lines(file):
            try:
                step, one = int(row.values["step"]), _scored(row.values)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{row.where}: not a recorded rollout: {_reason(error, row)}") from error
            steps.setdefault(step, []).append(one)
    return steps


def _reason(error: Exception, row: Row) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing; there are {', '.join(row.values)}"
    return str(error)


def _record(one: Scored, step: int) -> dict[str, Any]:
    rollout = one.rollout
    prompt = rollout.prompt
    return {
        "step": step,
        "group": rollout.group,
        "sample": rollout.sample,
        "version": rollout.version if len(set(rollout.versions)) <= 1 else _runs(rollout.versions),
        "reward": one.reward,
        "stop": rollout.stop.value,
        "text": rollout.text,
        "prompt": {
            "id": prompt.id,
            "source": prompt.source,
            "messages": [dict(message) for message in prompt.messages],
            "answer": prompt.answer,
            "hints": dict(prompt.hints),
            "tokens": list(prompt.tokens),
        },
        "tokens": list(rollout.tokens),
        "logprobs": None if rollout.logprobs is None else list(rollout.logprobs),
        "temperature": rollout.temperature,
        "origin": _shorten(rollout.origin),
        "facts": dict(one.facts),
    }


def _scored(record: Mapping[str, Any]) -> Scored:
    prompt = record["prompt"]
    tokens = tuple(map(int, record["tokens"]))
    logprobs = record["logprobs"]
    origin = record["origin"]
    versions = _unrolled(record["version"])
    return Scored(
        rollout=Rollout(
            prompt=Prompt(
                id=prompt["id"],
                source=prompt["source"],
                messages=tuple(prompt["messages"]),
                answer=prompt["answer"],
                hints=prompt["hints"],
                tokens=tuple(map(int, prompt["tokens"])),
            ),
            group=record["group"],
            sample=int(record["sample"]),
            tokens=tokens,
            logprobs=None if logprobs is None else tuple(map(float, logprobs)),
            temperature=record.get("temperature"),  # traces that are older do not say
            origin=(Origin(origin),) * len(tokens) if isinstance(origin, int) else tuple(map(Origin, origin)),
            stop=Stop(record["stop"]),
            version=min(versions),
            versions=versions if len(versions) > 1 else (),
            text=record["text"],
        ),
        reward=None if record["reward"] is None else float(record["reward"]),
        facts=record["facts"],
    )


def _shorten(origin: tuple[Origin, ...]) -> int | list[int]:
    """One number where a single hand wrote every token."""
    return int(origin[0]) if len(set(origin)) == 1 else [int(one) for one in origin]


def _runs(versions: tuple[int, ...]) -> list[list[int]]:
    """[version, how many tokens in a row it wrote], in order: weights change seldom while a response is written."""
    return [[version, len(list(tokens))] for version, tokens in groupby(versions)]


def _unrolled(version: int | list[list[int]]) -> tuple[int, ...]:
    """One version per token, or a single one that wrote everything."""
    if isinstance(version, int):
        return (version,)
    return tuple(one for one, tokens in version for _ in range(tokens))
