"""Our losses on the bench's inputs, as training calls them: the same functions, one vocabulary shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from megatron_distill.losses import divergence, vocab
from megatron_distill.losses.chunk import linear_loss
from megatron_distill.losses.kinds import Divergence
from megatron_distill.losses.top_k import top_k_divergence
from megatron_distill.types import Full, VocabPartition, VocabShard
from tools.bench.work import BETA, ENTROPY_WEIGHT, Hidden, Logits


def partition(vocab_size: int) -> VocabPartition:
    """All columns on one rank."""
    return VocabPartition(start=0, width=vocab_size, valid=vocab_size, group=None)


def logit_loss(loss: str, columns: VocabPartition) -> Callable[[Logits], Tensor]:
    """One of ours on logits, whose memory the gradient may take: one number per row."""

    def of(inputs: Logits) -> Tensor:
        student = VocabShard.of(inputs.student_RV, columns, disposable=True)
        if loss == "logprob":
            return vocab.logprob(student, inputs.ids_R)
        if loss == "logprob_entropy":
            logp_R, entropy_R = vocab.logprob_and_entropy(student, inputs.ids_R)
            return logp_R + ENTROPY_WEIGHT * entropy_R
        if loss == "top_k":
            return top_k_divergence(student, inputs.top_k, Divergence("forward_kl"), "tail")
        return between(loss, student, VocabShard.of(inputs.teacher_RV, columns))

    return of


def between(loss: str, student: VocabShard, teacher: VocabShard) -> Tensor:
    """A full-vocabulary divergence by the bench's name for it."""
    if loss == "forward_kl":
        return divergence.forward_kl(student, teacher)
    if loss == "reverse_kl":
        return divergence.reverse_kl(student, teacher)
    assert loss == "jsd", loss
    return divergence.jsd(student, teacher, BETA)


def linear(loss: str, add_to: Tensor | None = None) -> Callable[[Hidden], Tensor]:
    """The fused-linear path: output layer and loss chunk by chunk, the teacher's logits made for a chunk only.

    `add_to` gets the gradient of the output weight, as Megatron's `main_grad` does in training.
    """

    def of(inputs: Hidden) -> Tensor:
        columns = partition(inputs.shape.vocab)
        signal = Full(hidden_RH=inputs.teacher_RH, head_vH=inputs.teacher_VH, partition=columns)

        def rows_loss(logits_Cv: Tensor, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
            student = VocabShard.of(logits_Cv, columns, disposable=True)
            return between(loss, student, signal.rows(rows).shard(1.0)).sum(), {}

        return linear_loss(inputs.hidden_RH, inputs.weight_VH, rows_loss, inputs.shape.chunk, add_to=add_to)[0]

    return of
