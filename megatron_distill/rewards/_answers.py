r"""Where the final answer stands in a response: after a marker such as `####`, or in the last `\boxed{}`."""

from __future__ import annotations

BOX = "\\boxed{"


def final_answer(text: str, answer_after: str | None, boxed: bool) -> str | None:
    """The answer that stands last in `text`; None when there is none, or a box that never closes."""
    marker = text.rfind(answer_after) if answer_after else -1
    box = text.rfind(BOX) if boxed else -1
    if marker < 0 and box < 0:
        return None
    if box > marker:
        return _inside(text, box + len(BOX))
    assert answer_after
    lines = text[marker + len(answer_after) :].strip().splitlines()
    return lines[0].strip() if lines else None


def _inside(text: str, start: int) -> str | None:
    """What stands between an opening brace just before `start` and the one that closes it."""
    depth = 1
    for place in range(start, len(text)):
        if text[place] == "{":
            depth += 1
        elif text[place] == "}":
            depth -= 1
        if depth == 0:
            return text[start:place].strip()
    return None
