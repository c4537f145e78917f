"""The table of names, and the moving of rows between the two layouts, checked against layouts written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_distill.errors import ModelError
from megatron_distill.models.hf.mapping import Rule, cut_tp, export, merge_tp, rules
from megatron_distill.models.spec import Family, ModelSpec

FAMILIES: list[Family] = ["qwen2", "qwen3", "llama"]


def make_spec(family: Family = "qwen3", tied: bool = False, vocab_size: int = 21) -> ModelSpec:
    config = {
        "architectures": [{"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[family] + "ForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": 6,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": tied,
    }
    return ModelSpec.from_config(config, "config.json")


def random_tensors(rule: Rule) -> list[Tensor]:
    return [torch.randn(shape) for shape in rule.shapes]


def rule_named(spec: ModelSpec, end: str) -> Rule:
    return next(rule for rule in rules(spec) if rule.name.endswith(end))


def test_queries_keys_and_values_are_interleaved_by_group() -> None:
    rule = rule_named(make_spec(), "layers.1.self_attention.linear_qkv.weight")
    assert rule.hf == tuple(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")
    query, key, value = random_tensors(rule)  # 8 heads of 2 rows, 4 groups of 2 rows
    by_hand = []
    for group in range(4):
        by_hand += [query[4 * group : 4 * group + 4], key[2 * group : 2 * group + 2], value[2 * group : 2 * group + 2]]
    assert torch.equal(rule.merge([query, key, value]), torch.cat(by_hand))
    assert torch.equal(rule.cut([query, key, value], rank=1, size=2), torch.cat(by_hand[6:]))


def test_gate_and_up_are_stacked_within_each_rank() -> None:
    rule = rule_named(make_spec(), "layers.0.mlp.linear_fc1.weight")
    gate, up = random_tensors(rule)
    assert torch.equal(rule.cut([gate, up], rank=0, size=2), torch.cat([gate[:4], up[:4]]))
    assert torch.equal(rule.cut([gate, up], rank=1, size=2), torch.cat([gate[4:], up[4:]]))


def test_projections_back_are_cut_by_columns() -> None:
    rule = rule_named(make_spec(), "layers.0.mlp.linear_fc2.weight")
    (down,) = random_tensors(rule)
    assert torch.equal(rule.cut([down], rank=1, size=4), down[:, 2:4])


def test_padding_rows_are_zero_and_never_exported() -> None:
    rule = rule_named(make_spec(vocab_size=5), "embedding.word_embeddings.weight")
    (embedding,) = random_tensors(rule)
    shards = [rule.cut([embedding], rank, size=4, rows=2) for rank in range(4)]
    assert [shard.shape[0] for shard in shards] == [2, 2, 2, 2]
    assert torch.equal(torch.cat(shards)[:5], embedding)
    assert torch.cat(shards)[5:].count_nonzero() == 0
    for shard in shards:
        shard[(shard == 0).all(dim=1)] = float("nan")  # whatever training did to padding
    assert torch.equal(rule.join(shards)[0], embedding)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_rule_survives_any_cut_bit_for_bit(family: Family, tp: int) -> None:
    spec = make_spec(family, vocab_size=21)
    for rule in rules(spec):
        tensors = random_tensors(rule)
        rows = 24 // tp if rule.vocabulary else None
        shards = [rule.cut(tensors, rank, tp, rows) for rank in range(tp)]
        for back, tensor in zip(rule.join(shards), tensors, strict=True):
            assert torch.equal(back, tensor), rule.name
        merged = merge_tp(rule, shards)
        assert torch.equal(merged, rule.merge(tensors)), rule.name
        again = [cut_tp(rule, merged, rank, tp, rows) for rank in range(tp)]
        assert all(torch.equal(a, b) for a, b in zip(again, shards, strict=True)), rule.name


def test_groups_that_do_not_divide_are_refused() -> None:
    rule = rule_named(make_spec(), "layers.0.self_attention.linear_qkv.weight")
    with pytest.raises(ModelError, match="4 key-value groups do not divide over tp=8"):
        rule.cut(random_tensors(rule), rank=0, size=8)


@pytest.mark.parametrize("tied", [False, True])
def test_export_has_the_names_of_transformers_once_each(tied: bool) -> None:
    spec = make_spec("qwen2", tied=tied)
    table = {rule.name: rule.merge(random_tensors(rule)) for rule in rules(spec)}
    names = [name for name, _ in export(spec, lambda rule: [table[rule.name]])]
    assert len(names) == len(set(names)) == 2 + 2 * 12 + (not tied)
    assert ("lm_head.weight" in names) == (not tied)
    assert "model.layers.1.self_attn.k_proj.bias" in names


def test_export_may_leave_out_what_a_caller_does_not_hold() -> None:
    spec = make_spec()
    norm = torch.ones(6)
    found = list(export(spec, lambda rule: [norm] if rule.name == "decoder.final_layernorm.weight" else None))
    assert [name for name, _ in found] == ["model.norm.weight"]


def test_a_tensor_of_another_model_is_not_exported() -> None:
    spec = make_spec()
    with pytest.raises(ModelError, match=r"model\.norm\.weight \(7,\), the config says \(6,\)"):
        list(export(spec, lambda rule: [torch.ones(7)] if rule.hf == ("model.norm.weight",) else None))


def test_fused_layers_keep_norms_with_the_projection_behind_them() -> None:
    spec = make_spec()
    plain, fused = rules(spec), rules(spec, te=True)
    assert [rule.hf for rule in plain] == [rule.hf for rule in fused]
    moved = {old.name: new.name for old, new in zip(plain, fused, strict=True) if old.name != new.name}
    start = "decoder.layers.0."
    assert moved[start + "input_layernorm.weight"] == start + "self_attention.linear_qkv.layer_norm_weight"
    assert moved[start + "pre_mlp_layernorm.weight"] == start + "mlp.linear_fc1.layer_norm_weight"
    assert len(moved) == 2 * spec.num_layers
