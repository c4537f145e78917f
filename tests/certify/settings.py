"""What is to be certified: every objective, by its file name, under every setting that its oracle's file lists."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_distill.objectives.base import Objective, State
from megatron_distill.plugins import kinds, load
from tests.oracles import dense

OBJECTIVES = "megatron_distill.objectives"
NAMES = ("big", "small", "third")
"""Of teachers whose number only matters."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One objective as a config may set it, and what it works on."""

    kind: str
    fields: Mapping[str, Any]
    teachers: tuple[str, ...]
    data: str
    state: State
    one_micro_batch: bool = False
    """Whether it is defined by its micro-batches: then only a step in one of them can be certified."""

    @property
    def objective(self) -> Objective:
        """A new one."""
        return load(OBJECTIVES, self.kind, Objective)(**self.fields)

    def oracle(self, step: dense.Step) -> Tensor:
        """What the loss should be."""
        answer = oracle_of(self.kind).oracle(step, asdict(self.objective))
        assert isinstance(answer, Tensor)
        return answer

    def scale(self, step: dense.Step, loss: Tensor) -> float:
        """What an error of the loss is relative to: its magnitude, or where terms cancel the oracle's `scale`."""
        module = oracle_of(self.kind)
        stated = (
            float(torch.as_tensor(module.scale(step, asdict(self.objective))).detach())
            if hasattr(module, "scale")
            else 0.0
        )
        return max(abs(loss.item()), stated)

    def __str__(self) -> str:
        parts = [f"{name}={value}" for name, value in self.fields.items()] or ["defaults"]
        if self.teachers:
            parts.append(f"teachers={'+'.join(self.teachers)}")
        if self.state:
            parts.append(f"state={dict(self.state)}")
        return f"{self.kind} ({', '.join(parts)})"


def objectives() -> list[str]:
    """All there are."""
    return kinds(OBJECTIVES)


def oracle_of(kind: str) -> ModuleType:
    """Its oracle's module."""
    return importlib.import_module(f"tests.oracles.{kind}")


def settings(kind: str) -> list[Setting]:
    """Every setting that the oracle lists, with all its teachers and states."""
    oracle = oracle_of(kind)
    data, states = getattr(oracle, "DATA", "sampled"), getattr(oracle, "STATES", ({},))
    found = []
    for fields in oracle.FIELDS:
        objective = load(OBJECTIVES, kind, Objective)(**fields)
        values = asdict(objective)
        for teachers in _teachers(objective, fields, oracle.TEACHERS):
            for state in states(values) if callable(states) else states:
                found.append(
                    Setting(
                        kind=kind,
                        fields=fields,
                        teachers=teachers,
                        data=data(values) if callable(data) else data,
                        state={**objective.initial(), **state},
                        one_micro_batch=oracle.one_micro_batch(values) if hasattr(oracle, "one_micro_batch") else False,
                    )
                )
    return found


def network_settings(kind: str) -> list[Setting]:
    """Those for real Megatron: of each sort of data the default and the first with another temperature, and the first
    with several teachers. Others do not differ in how they are cut over stages and contexts.
    """
    found: dict[tuple[object, ...], Setting] = {}
    for setting in settings(kind):
        found.setdefault((setting.data, setting.objective.temperature == 1.0), setting)
        if len(setting.teachers) > 1:
            found.setdefault(("several teachers",), setting)
    return list({str(setting): setting for setting in found.values()}.values())


def _teachers(objective: Objective, fields: Mapping[str, Any], listed: tuple[Any, ...]) -> list[tuple[str, ...]]:
    if objective.needs.teacher is None:
        return [()]
    if fields.get("teacher_weights"):
        return [tuple(fields["teacher_weights"])]
    if fields.get("teacher_sources"):
        return [tuple(sorted(set(fields["teacher_sources"].values())))]
    named = [NAMES[:one] if isinstance(one, int) else tuple(one) for one in listed]
    found = [one for one in named if one]
    assert found, f"{type(objective).__name__} with {dict(fields)} needs a teacher: TEACHERS={listed} has none"
    return found
