"""Which Megatron parameter is which Hugging Face tensors, and how one is laid out in terms of the other.

Qwen2, Qwen3 and Llama share one table, `rules`. The whole algebra rests on one fact: with Megatron's layouts a
tensor-parallel shard is the *same* merge applied to equal slices of the Hugging Face tensors. So a rule knows two
things only: along which dim Hugging Face tensors are cut, and how their rows are put together:

    plain       one tensor, as it is
    stacked     gate over up: `mlp.linear_fc1`, per shard
    interleaved one block per key-value group, its queries, then its key, then its value: `linear_qkv`

Everything here is moving of rows: no arithmetic, so every round trip is exact to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_distill.errors import ModelError
from megatron_distill.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors that make it up."""

    name: str
    """Megatron's, with the layer's number in the whole model."""
    layer: int | None
    """None outside the layers."""
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of the whole Hugging Face tensors."""
    dim: int | None
    """Of the Hugging Face tensors, cut over tensor-parallel ranks; None: every rank holds all."""
    block: tuple[int, ...] = ()
    """Rows that each tensor gives to one interleaved block; empty: not interleaved."""
    vocabulary: bool = False
    """Rows are ids: Megatron pads them, Hugging Face does not."""
    exported: bool = True
    """False for a copy of weights that another rule exports."""

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors, whole or one rank's slices of them, to the Megatron tensor of the same extent."""
        if len(tensors) == 1:
            return tensors[0]
        if not self.block:
            return torch.cat(list(tensors))
        blocks = [tensor.unflatten(0, (-1, rows)) for tensor, rows in zip(tensors, self.block, strict=True)]
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Undo `merge`; what comes back may share storage with `tensor`."""
        return tuple(part.flatten(0, 1) if self.block else part for part in self.views(tensor))

    def views(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """As `split`, with nothing copied: rows of interleaved tensors lie in two dims, blocks and rows of a block."""
        if len(self.hf) == 1:
            return (tensor,)
        if not self.block:
            return tensor.chunk(len(self.hf))
        return tensor.unflatten(0, (-1, sum(self.block))).split(self.block, dim=1)

    def extent(self, index: int, rank: int, size: int, rows: int | None = None) -> tuple[int, int]:
        """Where this rank's slice of Hugging Face tensor `index` starts and stops along `dim`.

        Args:
            index: which of `hf`.
            rank: tensor-parallel rank.
            size: tensor-parallel ranks.
            rows: of the rank's padded shard of a vocabulary tensor; the slice then ends where real rows end.
        """
        assert self.dim is not None, self.name
        whole = self.shapes[index][self.dim]
        if self.vocabulary and rows is not None:
            return min(rank * rows, whole), min((rank + 1) * rows, whole)
        groups = whole // self.block[index] if self.block else whole
        if groups % size:
            what = "key-value groups" if self.block else f"entries of dim {self.dim}"
            raise ModelError(f"{self.hf[index]}: {groups} {what} do not divide over tp={size}; choose another tp")
        return rank * whole // size, (rank + 1) * whole // size

    def cut(self, tensors: Sequence[Tensor], rank: int, size: int, rows: int | None = None) -> Tensor:
        """This rank's Megatron shard of whole Hugging Face tensors; padding rows are zero."""
        if self.dim is None:
            return self.merge(tensors)
        extents = [self.extent(index, rank, size, rows) for index in range(len(tensors))]
        parts = [whole.narrow(self.dim, a, b - a) for whole, (a, b) in zip(tensors, extents, strict=True)]
        return self.pad(self.merge(parts), rows)

    def join(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Whole Hugging Face tensors of the shards of all tensor-parallel ranks, padding taken off.

        Raises:
            ModelError: the result has not the shape that the config promises.
        """
        parts = [self.split(shard) for shard in shards]
        wholes = parts[0]
        if self.dim is not None and len(shards) > 1:
            wholes = tuple(torch.cat(slices, dim=self.dim) for slices in zip(*parts, strict=True))
        if self.vocabulary:
            wholes = (wholes[0][: self.shapes[0][0]],)
        for name, whole, shape in zip(self.hf, wholes, self.shapes, strict=True):
            if tuple(whole.shape) != shape:
                raise ModelError(f"{self.name}: makes {name} {tuple(whole.shape)}, the config says {shape}")
        return wholes

    def pad(self, shard: Tensor, rows: int | None) -> Tensor:
        """Zero rows appended to a vocabulary shard until it has `rows`."""
        if rows is None or shard.shape[0] == rows:
            return shard
        return torch.cat([shard, shard.new_zeros(rows - shard.shape[0], *shard.shape[1:])])


def merge_tp(rule: Rule, shards: Sequence[Tensor]) -> Tensor:
    """Shards of all tensor-parallel ranks to the Megatron tensor of tp=1, without padding."""
    return rule.merge(rule.join(shards))


def cut_tp(rule: Rule, full: Tensor, rank: int, size: int, rows: int | None = None) -> Tensor:
    """One rank's shard of the Megatron tensor of tp=1; `rows` as in `Rule.extent`."""
    return rule.cut(rule.split(full), rank, size, rows)


def rules(spec: ModelSpec, te: bool = False) -> list[Rule]:
    """The table of a model, in the order of export; layer numbers are global.

    Args:
        spec: the architecture.
        te: names of Transformer Engine's layer spec, which keeps a norm's weight with the linear layer behind it.
    """
    embedding = "model.embed_tokens.weight"
    return [
        _ids("embedding.word_embeddings.weight", embedding, spec),
        *(rule for layer in range(spec.num_layers) for rule in _layer(spec, layer, te)),
        _whole("decoder.final_layernorm.weight", "model.norm.weight", spec.hidden_size, None),
        # Tied: only a last pipeline stage that is not the first has this parameter, as a copy.
        _ids("output_layer.weight", embedding, spec, exported=False)
        if spec.tied_embeddings
        else _ids("output_layer.weight", "lm_head.weight", spec),
    ]


def _layer(spec: ModelSpec, layer: int, te: bool) -> Iterator[Rule]:
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = tuple(f"{theirs}self_attn.{part}_proj" for part in "qkv")
    block = (queries // spec.num_kv_heads, spec.head_dim, spec.head_dim)
    norm = "self_attention.linear_qkv.layer_norm_weight" if te else "input_layernorm.weight"
    yield _whole(ours + norm, theirs + "input_layernorm.weight", spec.hidden_size, layer)
    yield Rule(
        name=ours + "self_attention.linear_qkv.weight",
        hf=tuple(f"{part}.weight" for part in attention),
        shapes=tuple((rows, spec.hidden_size) for rows in (queries, keys, keys)),
        dim=0,
        block=block,
        layer=layer,
    )
    if spec.qkv_bias:
        yield Rule(
            name=ours + "self_attention.linear_qkv.bias",
            hf=tuple(f"{part}.bias" for part in attention),
            shapes=((queries,), (keys,), (keys,)),
            dim=0,
            block=block,
            layer=layer,
        )
    if spec.qk_norm:
        for part in "qk":
            norm = f"self_attention.{part}_layernorm.weight"
            yield _whole(ours + norm, f"{theirs}self_attn.{part}_norm.weight", spec.head_dim, layer)
    yield Rule(
        name=ours + "self_attention.linear_proj.weight",
        hf=(theirs + "self_attn.o_proj.weight",),
        shapes=((spec.hidden_size, queries),),
        dim=1,
        layer=layer,
    )
    norm = "mlp.linear_fc1.layer_norm_weight" if te else "pre_mlp_layernorm.weight"
    yield _whole(ours + norm, theirs + "post_attention_layernorm.weight", spec.hidden_size, layer)
    yield Rule(
        name=ours + "mlp.linear_fc1.weight",
        hf=(theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"),
        shapes=((spec.ffn_hidden_size, spec.hidden_size),) * 2,
        dim=0,
        layer=layer,
    )
    yield Rule(
        name=ours + "mlp.linear_fc2.weight",
        hf=(theirs + "mlp.down_proj.weight",),
        shapes=((spec.hidden_size, spec.ffn_hidden_size),),
        dim=1,
        layer=layer,
    )


def _whole(name: str, hf: str, size: int, layer: int | None) -> Rule:
    return Rule(name=name, hf=(hf,), shapes=((size,),), dim=None, layer=layer)


def _ids(name: str, hf: str, spec: ModelSpec, exported: bool = True) -> Rule:
    shape = (spec.vocab_size, spec.hidden_size)
    return Rule(name=name, hf=(hf,), shapes=(shape,), dim=0, layer=None, vocabulary=True, exported=exported)


def export(
    spec: ModelSpec, shards: Callable[[Rule], Sequence[Tensor] | None], te: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors by name, in the order of `rules`: the same on every rank.

    Args:
        spec: the architecture.
        shards: a rule's Megatron parameter as the shards of all tensor-parallel ranks, in rank order; None to
            leave it out. Called once per exported rule in a fixed order, so it may be collective.
        te: as for `rules`.
    """
    for rule in rules(spec, te):
        if rule.exported:
            yield from _wholes(rule, shards)


def _wholes(rule: Rule, shards: Callable[[Rule], Sequence[Tensor] | None]) -> Iterator[tuple[str, Tensor]]:
    """A rule's tensors; shards are let go before the first is handed out, each tensor before the next rule's come."""
    found = shards(rule)
    if found is None:
        return
    wholes = list(zip(rule.hf, rule.join(found), strict=True))
    del found
    while wholes:
        yield wholes.pop(0)
