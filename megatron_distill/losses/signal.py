"""Ask a teacher's signal a question: a richer signal answers every poorer one, a poorer one says that it cannot."""

from __future__ import annotations

from torch import Tensor

from megatron_distill.errors import ConfigError
from megatron_distill.losses.vocab import logprob
from megatron_distill.types import Full, TeacherSignal, VocabShard


def teacher_logprob(signal: TeacherSignal, ids_R: Tensor, temperature: float) -> Tensor:
    """The teacher's log-prob of the response tokens `ids_R`: [R].

    Signals other than `Full` were made at the temperature of whoever made them; `temperature` speaks for `Full` only.
    """
    if isinstance(signal, Full):
        return logprob(signal.shard(temperature), ids_R)
    return signal.logp_R


def teacher_shard(signal: TeacherSignal, temperature: float) -> VocabShard:
    """The teacher's whole distribution on these rows.

    Raises:
        ConfigError: the teacher sent less than that.
    """
    if not isinstance(signal, Full):
        raise ConfigError(
            f"teacher: gives a {signal.fidelity.name.lower()} signal, this objective needs full: "
            "use teacher.kind=frozen, or an objective that is content with less"
        )
    return signal.shard(temperature)
