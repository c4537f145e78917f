"""A remote teacher's settings, and what is found out about servers before a step: wrong ones, and none at all."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_distill.errors import EngineError, ServerLost
from megatron_distill.rollout.base import Given
from megatron_distill.rollout.sglang import Address, Scores, ServerInfo
from megatron_distill.teachers._served import Introduced, Served, _difference, _stranger, alive, ask, introduce
from megatron_distill.teachers._servers import Elsewhere
from megatron_distill.teachers.remote import RemotePart
from megatron_distill.testing.tiny import tiny_model
from megatron_distill.types import Fidelity

FOLDER = Path("teacher")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "teacher", "llama", vocab_size=300)


@pytest.fixture
def nobody():
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield Address(f"http://127.0.0.1:{taken.getsockname()[1]}")


def served(folder, **changes):
    given = {"served_as": str(folder.resolve()), "vocabulary": 259, "in_flight": 4, "request_seconds": 5.0}
    given |= {"silent_seconds": 5.0}
    return Served(model=folder, **{**given, **changes})


def info(folder, **changes):
    told = {
        "model_path": str(folder.resolve()),
        "served_name": "teacher",
        "weight_version": "default",
        "vocab_size": 300,
        "context_length": 512,
        "longest_prompt": 505,
        "longest": 510,
        "tp_size": 1,
        "version": "0.5.23",
        "settings": {"architectures": ["LlamaForCausalLM"]},
    }
    return ServerInfo(**{**told, **changes})


def test_what_it_gives_follows_from_top_k():
    assert RemotePart(model=FOLDER).provides is Fidelity.TOKEN
    assert RemotePart(model=FOLDER, top_k=8).provides is Fidelity.TOP_K
    assert RemotePart(model=FOLDER).folder == FOLDER


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"top_k": -1}, "top_k=-1: must be 0 or more"),
        ({"in_flight": 0}, "in_flight=0: must be 1 or more"),
        ({"request_seconds": 0.0}, "request_seconds=0.0: must be above 0"),
        ({"urls": ("127.0.0.1:30000",)}, "urls: url='127.0.0.1:30000': must look like http://host:port"),
        ({"urls": ("http://10.0.0.1:30000",)}, "urls: http://10.0.0.1:30000 is reached over a network: start it with"),
        ({"silent_seconds": -1.0}, "silent_seconds=-1.0: must be above 0"),
        ({"served_as": "x"}, "served_as=x: the run starts the servers itself; leave it null, or set urls"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=r".") as caught:
        RemotePart(model=FOLDER, **settings)
    assert str(caught.value).startswith(complaint)


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ({"model_path": "/models/other"}, "serves /models/other, the teacher is"),
        ({"vocab_size": 320}, "its model has 320 ids,"),
        ({"settings": {"architectures": ["Qwen3ForCausalLM"]}}, "serves a ['Qwen3ForCausalLM'],"),
    ],
)
def test_a_server_of_another_model_is_told_apart(folder, told, complaint):
    assert _difference(served(folder), info(folder)) is None
    assert _difference(served(folder), info(folder, **told)).startswith(complaint)


def test_a_model_may_have_another_path_where_it_is_served(folder):
    elsewhere = info(folder, model_path="/models/other")
    assert "set the teacher's served_as=/models/other" in _difference(served(folder), elsewhere)
    assert _difference(served(folder, served_as="/models/other"), elsewhere) is None


def test_servers_must_agree_on_a_fixed_text():
    known = Introduced(longest=9, canary=np.array([-1.0, -2.0, -3.0]), version="default")
    noise = np.array([0.01, -0.02, 0.03])
    assert _stranger(known, Scores(logprobs=known.canary + noise, version="default")) is None
    assert "0.667 nats off" in _stranger(known, Scores(logprobs=known.canary - np.array([0, 1, 1]), version="default"))
    assert "version '3'" in _stranger(known, Scores(logprobs=known.canary, version="3"))


def test_a_server_that_is_not_there_is_said_so(folder, nobody):
    with pytest.raises(ServerLost, match=nobody.url):
        introduce(served(folder), [nobody])
    assert alive(served(folder), [nobody]) == []


def test_asking_servers_that_are_gone_names_them_and_returns(folder, nobody):
    heard = []
    given = [Given(tokens=(1, 2, 3), start=1)] * 3
    outcome = ask(served(folder), [nobody], given, 0, lambda *one: heard.append(one))
    assert not outcome.complete
    assert outcome.lost == (nobody.url,)
    assert outcome.failure is None
    assert heard == []


def test_waiting_for_servers_of_others_ends():
    looked = []

    def reacting():
        looked.append(time.monotonic())
        return ["http://b"] if len(looked) == 2 else []

    Elsewhere(urls=["http://a", "http://b"], seconds=60.0, reacting=reacting).revive(["http://a", "http://b"])
    assert len(looked) == 2
    with pytest.raises(EngineError, match=r"none of the teacher's servers came back within 0 s"):
        Elsewhere(urls=["http://a"], seconds=0.0, reacting=list).revive(["http://a"])
