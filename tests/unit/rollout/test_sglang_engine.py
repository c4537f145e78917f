"""The engine that asks servers: settings that cannot be, and what tells a wrong server from a right one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_distill.rollout.engines._identity import difference
from megatron_distill.rollout.engines.sglang import SGLang
from megatron_distill.rollout.server_settings import ServerSettings
from megatron_distill.rollout.sglang import ServerInfo
from megatron_distill.rollout.sync import SyncSettings
from megatron_distill.testing.tiny import tiny_model


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"in_flight": 0}, "in_flight=0: must be at least 1"),
        ({"most_restarts": -1}, "most_restarts=-1: must be at least 0"),
        ({"probe_seconds": 1.0}, "probe_seconds=1.0: must be at least 2"),
        ({"silent_seconds": 3.0}, "silent_seconds=3.0: must be at least probe_seconds=5.0"),
        ({"urls": ("http://10.0.0.1:1",)}, "urls: http://10.0.0.1:1 is reached over a network: start it with a key"),
        ({"urls": ("10.0.0.1:30000",)}, "urls: '10.0.0.1:30000': must look like http://host:port"),
        ({"urls": ("http://localhost:1", "http://localhost:1/")}, "urls: http://localhost:1 is named twice"),
        (
            {
                "urls": ("http://10.0.0.1:1",),
                "servers": ServerSettings(api_key_file=Path("key")),
                "sync": SyncSettings(transport="tensor"),
            },
            "sync.transport=tensor shares this machine's memory, http://10.0.0.1:1 is elsewhere",
        ),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match="^" + complaint.replace("[", r"\[").replace("?", r"\?")):
        SGLang(**fields)


def test_servers_on_this_machine_need_no_key() -> None:
    assert SGLang(urls=("http://localhost:30000", "http://127.0.0.1:30001")).urls


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("student"), "qwen3", vocab_size=96)


def told(model: Path | str, **fields: Any) -> ServerInfo:
    return ServerInfo(
        **{
            "model_path": str(model),
            "served_name": str(model),
            "weight_version": "default",
            "vocab_size": 96,
            "context_length": 512,
            "longest_prompt": 505,
            "longest": 510,
            "tp_size": 1,
            "version": "0.5.23",
            "settings": {"architectures": ["Qwen3ForCausalLM"]},
        }
        | fields
    )


def test_the_student_served_from_elsewhere_is_the_student(student: Path, tmp_path: Path) -> None:
    assert difference(told(student), student, 96) is None
    assert difference(told("/no/such/folder/here"), student, 90) is None
    copy = tiny_model(tmp_path / "copy", "qwen3", vocab_size=96, seed=7)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert difference(told(copy), student, 96) is None, "weights and their type on disk do not matter"


def test_another_model_is_told_apart(student: Path, tmp_path: Path) -> None:
    llama = told("x", settings={"architectures": ["LlamaForCausalLM"]})
    assert difference(llama, student, 96) == "serves x, a LlamaForCausalLM, but the student is a Qwen3ForCausalLM"
    assert "whose vocabulary has 100 ids, but the student's has 96" in str(
        difference(told("x", vocab_size=100), student, 96)
    )
    deep = tiny_model(tmp_path / "deep", "qwen3", vocab_size=96, layers=3)
    assert difference(told(deep), student, 96) == f"serves {deep} with num_layers=3, but the student has 2"


@pytest.mark.parametrize(("context_length", "room"), [(None, 510), (100, 98)])
def test_a_prompt_and_its_response_have_the_servers_context_but_for_two_tokens(
    context_length: int | None, room: int
) -> None:
    assert SGLang(servers=ServerSettings(context_length=context_length)).room(512) == room
