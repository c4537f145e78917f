"""ModelSpec reads what transformers writes, old and new, and refuses what our arithmetic would get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_distill.errors import ModelError
from megatron_distill.models.spec import ModelLimits, ModelSpec, RopeScaling

SIZES: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SIZES}


def spec_of(config: dict[str, Any]) -> ModelSpec:
    return ModelSpec.from_config(config, "config.json")


def test_reads_what_transformers_writes(tmp_path: Path) -> None:
    for config_class, family in ((Qwen2Config, "qwen2"), (Qwen3Config, "qwen3"), (LlamaConfig, "llama")):
        folder = tmp_path / family
        config = config_class(**SIZES, head_dim=8, tie_word_embeddings=True, dtype="bfloat16", rms_norm_eps=1e-5)
        config.architectures = [config_class.__name__.replace("Config", "ForCausalLM")]
        config.save_pretrained(folder)
        spec = ModelSpec.from_folder(folder)
        assert spec.family == family
        assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (3, 8, 2, 8)
        assert (spec.hidden_size, spec.ffn_hidden_size, spec.vocab_size, spec.max_positions) == (64, 96, 331, 256)
        assert (spec.tied_embeddings, spec.torch_dtype, spec.norm_eps) == (True, "bfloat16", 1e-5)
        assert spec.qkv_bias == (family == "qwen2")
        assert spec.qk_norm == (family == "qwen3")


def test_head_size_may_differ_from_hidden_over_heads() -> None:
    assert spec_of({**LLAMA}).head_dim == 8
    assert spec_of({**LLAMA, "head_dim": 24}).head_dim == 24


def test_old_and_new_rope_keys_say_the_same() -> None:
    new = spec_of({**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    old = spec_of({**LLAMA, "rope_theta": 500000, "rope_scaling": LLAMA3})
    oldest = spec_of({**LLAMA, "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}})
    assert new == old == oldest
    assert new.rope_theta == 5e5
    scaling = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
    assert new.rope_scaling == scaling
    plain = spec_of({**QWEN2, "rope_theta": 1e6, "rope_scaling": None})
    assert (plain.rope_theta, plain.rope_scaling) == (1e6, None)


@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_rotary_frequencies_are_those_of_transformers(factor: float) -> None:
    rope = {**LLAMA3, "factor": factor, "rope_theta": 1e4}
    config = LlamaConfig(**SIZES, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    spec = spec_of({**LLAMA, "rope_parameters": rope})
    assert torch.equal(spec.rotary_frequencies(), expected)
    unscaled = spec_of({**LLAMA, "rope_theta": 1e4}).rotary_frequencies()
    assert not torch.equal(unscaled, expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "Qwen2ForCausalLM, Qwen3ForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None, "model_type": None}, "model_type=None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {**LLAMA3, "factor": None}}, "rope factor=None"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"num_hidden_layers": None}, "num_hidden_layers=None"),
        ({"vocab_size": "331"}, "vocab_size='331'"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_refuses_what_it_would_get_wrong(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        spec_of({**LLAMA, **change})
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sliding_window_counts_only_where_it_is_used() -> None:
    window = {"sliding_window": 128, "use_sliding_window": False, "max_window_layers": 1}
    assert spec_of({**QWEN2, **window}).num_layers == 3
    assert spec_of({**QWEN2, **window, "use_sliding_window": True, "max_window_layers": 28}).num_layers == 3
    with pytest.raises(ModelError, match="2 layers use sliding_attention"):
        spec_of({**QWEN2, **window, "use_sliding_window": True})


def test_folder_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        ModelSpec.from_folder(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        ModelSpec.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        ModelSpec.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="must be an object"):
        ModelSpec.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    assert ModelSpec.from_folder(tmp_path).family == "qwen2"


def test_limits_are_read_of_any_family(tmp_path):
    numbers = {"vocab_size": 300, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "some_moe", **numbers}))
    assert ModelLimits.from_folder(tmp_path) == ModelLimits(vocab_size=300, max_positions=64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "some_vision", "text_config": numbers}))
    assert ModelLimits.from_folder(tmp_path) == ModelLimits(vocab_size=300, max_positions=64)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300}))
    with pytest.raises(ModelError, match="max_position_embeddings=None: must be a positive whole number"):
        ModelLimits.from_folder(tmp_path)
