"""Evaluation while training: the student as it is now, on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_distill.config import RunConfig
from megatron_distill.data.prompts import Prompts, load_prompts
from megatron_distill.eval.runner import EvalSection, evaluate
from megatron_distill.models.student import Student
from megatron_distill.rollout.base import RolloutEngine
from megatron_distill.rollout.engines.base import Serving
from megatron_distill.rollout.engines.embedded import Embedded
from megatron_distill.rollout.sample import Tools
from megatron_distill.types import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True, kw_only=True)
class HeldOut:
    """Held-out prompts, and what answers and judges them."""

    section: EvalSection
    prompts: Prompts
    tools: Tools
    follows: bool
    """Whether its engine is the source's, which has the newest weights anyhow; otherwise it is one of its own."""
    seed: int
    folder: Path

    @staticmethod
    def connect(
        run: RunConfig, student: Student, tokenizer: PreTrainedTokenizerBase, engine: RolloutEngine | None
    ) -> HeldOut | None:
        """None where the config asks for no evaluation while training; `engine` is the source's, if it has one."""
        section = run.eval
        if section.data is None or section.every == 0:
            return None
        follows = engine is not None
        if engine is None:
            engine = Embedded().connect(
                Serving(
                    folder=run.student.model,
                    tokenizer=tokenizer,
                    ranks=student.mesh,
                    valid_vocab=student.partition.valid,
                    device=student.network.runtime.backend.device,
                )
            )
        tools = Tools(
            engine=engine,
            judge=run.reward.connect(),
            tokenizer=tokenizer,
            ranks=student.mesh,
        )
        prompts = load_prompts(section.data, tokenizer)
        return HeldOut(
            section=section,
            prompts=prompts,
            tools=tools,
            follows=follows,
            seed=run.train.seed,
            folder=run.paths.run / "samples",
        )

    def close(self) -> None:
        """End the verifier's processes, and the engine if it is its own."""
        self.tools.judge.close()
        if not self.follows:
            self.tools.engine.close()

    def ask(self, student: Student, step: int) -> tuple[Metric, ...]:
        """avg@k, pass@k and the rest after `step` updates; collective."""
        if not self.follows:
            self.tools.engine.load_weights(student, step)
        return evaluate(self.tools, self.prompts, self.section, step=step, seed=self.seed, folder=self.folder)
