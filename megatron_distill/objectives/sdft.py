"""Self-distillation fine-tuning (arXiv 2601.19897): the student learns from itself as it reads a demonstration.

    E_{y ~ q} sum_n D(p, q),   q = student(. | x, y_<n),   p = the same network with a demonstration c (. | c, x, y_<n)

The demonstration is the teacher's context and never a target, so the student stays close to what it can already
say, which is the point: new skills, little forgotten. The paper's text has D as the reverse KL; its authors state
that all its results were made with the forward KL, which is the default here.

Who the teacher is and what it reads belongs to `teachers`: the loss works with any.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_distill.objectives._compared import AnyDivergence


@dataclass(frozen=True, kw_only=True)
class SDFT(AnyDivergence):
    """A divergence of student and teacher, averaged: by default the forward KL over the whole vocabulary."""
