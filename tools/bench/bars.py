"""What the losses have to reach, and whether they did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.bench.collectives import EXPECTED
from tools.bench.comparisons import COMPILED, FLOOR, INTO_BUFFER, LIGER_COMPILED, MEGATRON, NAIVE, OURS, TRL
from tools.bench.timing import Samples, ratio
from tools.bench.work import Shape

TIME: dict[str, dict[str, float]] = {
    "forward_kl": {COMPILED: 0.9, NAIVE: 0.5},
    "reverse_kl": {COMPILED: 0.9, NAIVE: 0.5},
    "jsd": {COMPILED: 1.0, TRL: 0.28},
    "logprob": {MEGATRON: 0.65, NAIVE: 0.75},
    "logprob_entropy": {},
    "top_k": {NAIVE: 0.75},
}
"""By loss and rival: our time over theirs, at the logits."""
LINEAR_TIME: dict[str, dict[str, float]] = {
    "forward_kl": {FLOOR: 1.10, LIGER_COMPILED: 1.05},
    "jsd": {FLOOR: 1.15, LIGER_COMPILED: 1.05},
}
"""The same from the hidden states on."""
IN_PLACE_COPIES = 0.1
LINEAR_CHUNKS = 2.01
"""In [chunk, V] of fp32, besides the gradients of hidden states and output weight; 1% is for what is kept per row."""
BF16_LOSS_ERROR = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One bar, held against one measurement."""

    what: str
    shape: str
    limit: float
    measured: float | None
    """None: it could not be measured, for the reason in `note`. That is no failure."""
    best: float | None = None
    """Of a ratio of times: that of the least disturbed rounds."""
    note: str = ""

    @property
    def passed(self) -> bool:
        """Judged by the median."""
        return self.measured is None or self.measured <= self.limit


def judge(shape: Shape, loss: str, report: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """All bars on times, memory and bf16 accuracy of one comparison."""
    label = f"fused-linear {loss}" if shape.hidden else loss
    if report[OURS].get("refused"):
        return [Verdict(what=f"{label}: ours", shape=shape.name, limit=0, measured=1, note=report[OURS]["refused"])]
    limits = (LINEAR_TIME if shape.hidden else TIME)[loss]
    found = [_judge_time(shape, label, rival, limit, report) for rival, limit in limits.items()]
    for name in (OURS, INTO_BUFFER):
        found += _judge_memory(shape, label if name == OURS else f"{label} into main_grad", name, report.get(name, {}))
    if shape.dtype == "bfloat16":
        error = report[OURS]["loss_error"]
        found.append(
            Verdict(what=f"{label}: error of the loss", shape=shape.name, limit=BF16_LOSS_ERROR, measured=error)
        )
    return found


def _judge_time(shape: Shape, label: str, rival: str, limit: float, report: Mapping[str, Mapping[str, Any]]) -> Verdict:
    what = f"{label}: time / {rival}"
    if "ms" not in report[rival]:
        return Verdict(what=what, shape=shape.name, limit=limit, measured=None, note=report[rival]["refused"])
    times = {name: Samples(tuple(report[name]["ms"])) for name in (OURS, rival)}
    found = ratio(times, OURS, rival)
    return Verdict(what=what, shape=shape.name, limit=limit, measured=found.median, best=found.best)


def _judge_memory(shape: Shape, label: str, name: str, mine: Mapping[str, Any]) -> Iterator[Verdict]:
    if "peak_bytes" not in mine:
        return
    if not shape.hidden:
        what = f"{label}: peak beyond inputs, [T, V] copies"
        yield Verdict(what=what, shape=shape.name, limit=IN_PLACE_COPIES, measured=mine["peak_copies"])
        return
    # the buffer was there before, so the gradient of the weight is not in the peak
    gradients = shape.rows * shape.hidden * 4 + (shape.vocab * shape.hidden * 4 if name == OURS else 0)
    chunks = (mine["peak_bytes"] - gradients) / (shape.chunk * shape.vocab * 4)
    what = f"{label}: peak beyond inputs and gradients, chunks"
    yield Verdict(what=what, shape=shape.name, limit=LINEAR_CHUNKS, measured=chunks)


def judge_collectives(counts: Mapping[str, Mapping[str, int]]) -> list[Verdict]:
    """Exactly as many as expected forward, none backward; of both backends."""
    found = []
    for loss, expected in EXPECTED.items():
        for label in (loss, f"{loss}, eager"):
            taken = counts[label]
            off = abs(taken["forward"] - expected) + taken["backward"]
            note = f"{taken['forward']} forward, {taken['backward']} backward"
            found.append(
                Verdict(what=f"{label}: collectives beyond {expected}", shape="TP=2", limit=0, measured=off, note=note)
            )
    return found


def all_passed(verdicts: Sequence[Verdict]) -> bool:
    """What the exit status says."""
    return all(verdict.passed for verdict in verdicts)
