"""How much of a response the teacher writes before the student goes on: off-policy guidance that fades.

TrOPD (arXiv 2606.01249) starts the student's responses with the teacher's text, of a length that falls along a cosine
to nothing over training. The paper gives no formula; docs/objectives/tropd.md says why this one.
"""

from __future__ import annotations

import math


def prefix_length(step: int, steps: int, longest: int) -> int:
    """The most tokens of a response that the teacher writes in `step`: round(longest (1 + cos(pi step/steps)) / 2).

    A prefix is the teacher's response cut to that length; where the teacher's response ends within it, nothing is left
    for the student to continue. All of `longest` at step 0, half of it halfway, and none in a step after the last.

    Args:
        step: updates done, from 0.
        steps: of the whole run.
        longest: tokens of the longest response.

    Raises:
        ValueError: a negative number, or a run without steps.
    """
    if step < 0:
        raise ValueError(f"step={step}: must be 0 or more")
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    if longest < 0:
        raise ValueError(f"longest={longest}: must be 0 or more")
    return round(longest * 0.5 * (1.0 + math.cos(math.pi * min(step / steps, 1.0))))
