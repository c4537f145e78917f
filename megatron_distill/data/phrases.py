"""SD-Zero's control phrases: the sentence after a response that says whether it was right, and begins its revision.

The same words must stand in both phases (revision training and self-distillation), so they are set down once here;
`rollout.kind=revise` and a teacher's revision view take them from the same two settings' defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Phrases:
    """What follows a response, on lines of its own."""

    right: str = "Let me rephrase the above solution."
    """After a response with a reward above 0.5."""
    wrong: str = "Wait, this response is not correct, let me start over."
    """After any other."""

    def __post_init__(self) -> None:
        for name in ("right", "wrong"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: must not be empty")

    def tokens(self, tokenizer: PreTrainedTokenizerBase, reward: float) -> tuple[int, ...]:
        """Ids of the phrase for `reward`, blank lines around it; cut apart from the text on either side."""
        phrase = self.right if reward > 0.5 else self.wrong
        return tuple(tokenizer(f"\n\n{phrase}\n\n", add_special_tokens=False, verbose=False)["input_ids"])
