"""Ask a teacher's signal a question: a richer signal answers every poorer one, a poorer one says that it cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_distill.errors import ConfigError
from megatron_distill.losses.vocab import entropy, logprob, top_k
from megatron_distill.types import Full, TeacherSignal, TopK, VocabShard


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
    return _full(signal, "needs full").shard(temperature)


def teacher_entropy(signal: TeacherSignal, temperature: float) -> Tensor:
    """H(p) of the teacher's whole distribution in nats: [R].

    Raises:
        ConfigError: the teacher sent less than that.
    """
    return entropy(_full(signal, "needs its entropy").shard(temperature)).detach()


def teacher_top_k(signal: TeacherSignal, k: int, temperature: float) -> TopK:
    """The teacher's k likeliest ids, likeliest first, and their log-probs: [R, K].

    Of a `Full` signal they are computed, in one all-gather; `logp_R`, of response tokens that nobody named here, is
    NaN. A `TopK` signal with more ids is cut; it was made at the temperature of whoever made it.

    Raises:
        ConfigError: the teacher sent fewer than k ids, or none.
        ValueError: the vocabulary has fewer than k ids.
    """
    if isinstance(signal, Full):
        ids_RK, logp_RK = top_k(signal.shard(temperature), k)
        return TopK(logp_R=torch.full_like(logp_RK[:, 0], float("nan")), ids_RK=ids_RK, top_logp_RK=logp_RK)
    if not isinstance(signal, TopK):
        raise _too_poor(signal, f"needs the {k} likeliest ids")
    sent = signal.ids_RK.shape[-1]
    if sent < k:
        raise ConfigError(f"teacher: sent its {sent} likeliest ids, objective.top_k={k} asks for more: lower it")
    if sent == k:
        return signal
    # whoever sent them may have put the response token first or last
    order_RK = signal.top_logp_RK.argsort(dim=-1, descending=True, stable=True)[:, :k]
    return TopK(
        logp_R=signal.logp_R,
        ids_RK=signal.ids_RK.gather(-1, order_RK),
        top_logp_RK=signal.top_logp_RK.gather(-1, order_RK),
    )


def _full(signal: TeacherSignal, need: str) -> Full:
    if not isinstance(signal, Full):
        raise _too_poor(signal, need)
    return signal


def _too_poor(signal: TeacherSignal, need: str) -> ConfigError:
    return ConfigError(
        f"teacher: gives a {signal.fidelity.name.lower()} signal, this objective {need}: "
        "use teacher.kind=frozen, or an objective that is content with less"
    )
