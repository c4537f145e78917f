"""What every rollout engine must do, whichever it is: the embedded one, and real SGLang servers.

Both serve the same folder: a tiny model with random weights, whose vocabulary is larger than what the run uses.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_distill.data.templates import load_tokenizer
from megatron_distill.errors import EngineError
from megatron_distill.rollout.base import Completion, Given, Request, RolloutEngine, Sampling, WholeWeights
from megatron_distill.rollout.engines.base import EnginePart, Serving
from megatron_distill.rollout.engines.embedded import Embedded
from megatron_distill.rollout.engines.sglang import SGLang
from megatron_distill.rollout.sglang import Address, Client
from megatron_distill.testing.tiny import tiny_model
from megatron_distill.types import Stop

VALID = 250
"""Ids that the run uses, of 259 that the model has columns for."""
STOP = (2, 60)
TOLERANCE = 1e-4


class Alone:
    """One rank."""

    rank, world = 0, 1

    def gather_objects[T](self, value: T) -> list[T]:
        return [value]


@dataclass
class Tried:
    """An engine, and the model that it serves, by itself."""

    engine: RolloutEngine
    folder: Path
    urls: tuple[str, ...]
    """Of its servers, if it has any."""
    model: Any = None

    def take(self, folder: Path, version: int) -> None:
        """Let the engine hold the weights of a folder, as this version.

        Servers read them from there, and the engine only names them: pushing is weight sync's, with tests of its own.
        """
        self.model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        asyncio.run(read_weights(self.urls, folder))
        self.engine.load_weights(WholeWeights(lambda: self.model.state_dict().items(), folder=self.folder), version)

    def logp_RV(self, tokens: Sequence[int], start: int, temperature: float) -> torch.Tensor:
        """Of every id at the places of `tokens[start:]`, by one forward pass of transformers."""
        with torch.no_grad():
            logits = self.model(torch.tensor([tokens])).logits[0, start - 1 : -1, :VALID]
        return (logits.double() / temperature).log_softmax(-1)

    def logprobs(self, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> list[float]:
        """Of a response."""
        logp_RV = self.logp_RV([*prompt, *response], len(prompt), temperature)
        return logp_RV.gather(1, torch.tensor(response)[:, None]).squeeze(1).tolist()


@pytest.fixture(scope="module")
def folder(tiny_served: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The served model, with two ids that end a response."""
    copy = tmp_path_factory.mktemp("contract") / "student"
    shutil.copytree(tiny_served, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": list(STOP)}), encoding="utf-8")
    return copy


@pytest.fixture(
    scope="module", params=["embedded", pytest.param("sglang", marks=[pytest.mark.sglang, pytest.mark.timeout(900)])]
)
def tried(request: pytest.FixtureRequest, folder: Path) -> Iterator[Tried]:
    urls: tuple[str, ...] = ()
    part: EnginePart = Embedded(batch_size=16)
    if request.param == "sglang":
        urls = tuple(request.getfixturevalue("served").urls)
        part = SGLang(urls=urls, in_flight=16)
    serving = Serving(folder=folder, tokenizer=load_tokenizer(folder), ranks=Alone(), valid_vocab=VALID)
    engine = part.connect(serving)
    with pytest.raises(EngineError, match="no weights"):
        engine.generate(requests(1, Sampling()))
    made = Tried(engine, folder, urls)
    made.take(folder, 5)
    yield made
    engine.close()


async def read_weights(urls: Sequence[str], folder: Path) -> None:
    """Give servers the weights of a folder, whatever tests before have given them."""
    for url in urls:
        async with Client(Address(url)) as client:
            await client.resume()
            await client.update_disk(folder)
            await client.flush_cache()
            await client.set_version("default")


def requests(count: int, sampling: Sampling) -> list[Request]:
    """Prompts of 3 to 15 tokens, some of them equal."""
    prompts = [
        tuple(3 + (7 * place + index // 2) % (VALID - 3) for place in range(3 + index % 13)) for index in range(count)
    ]
    return [Request(tokens=prompt, sampling=sampling, key=(1, index)) for index, prompt in enumerate(prompts)]


def check_schema(asked: Sequence[Request], done: Sequence[Completion]) -> None:
    """What can be said of any completions that nobody aborted."""
    assert len(done) == len(asked)
    for request, one in zip(asked, done, strict=True):
        assert all(type(token) is int and 0 <= token < VALID for token in one.tokens), "no id of the padding is drawn"
        assert all(type(logprob) is float and math.isfinite(logprob) for logprob in one.logprobs)
        assert len(one.tokens) == len(one.logprobs) == len(one.versions)
        assert not set(one.tokens[:-1]) & set(STOP), "a response ends at the first id that stops"
        longest = request.sampling.max_new_tokens
        if one.tokens[-1] in STOP:
            assert one.stop is Stop.EOS
            assert len(one.tokens) <= longest
        else:
            assert one.stop is Stop.LENGTH
            assert len(one.tokens) == longest


def test_responses_come_in_order_and_end_for_a_reason(tried: Tried) -> None:
    asked = requests(40, Sampling(max_new_tokens=100))
    done = tried.engine.generate(asked)
    check_schema(asked, done)
    assert {one.stop for one in done} == {Stop.EOS, Stop.LENGTH}
    assert len({one.tokens for one in done}) == len(done), "equal prompts have draws of their own"
    check_order(tried, asked, done)


def check_order(tried: Tried, asked: Sequence[Request], done: Sequence[Completion]) -> None:
    """Only its own prompt explains a response's log-probs."""
    for request, one in zip(asked, done, strict=True):
        expected = tried.logprobs(request.tokens, one.tokens, request.sampling.logprob_temperature)
        assert one.logprobs == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, max_new_tokens=40),
        Sampling(temperature=0.6, max_new_tokens=40),
        Sampling(temperature=1.7, max_new_tokens=40),
        Sampling(temperature=0.8, top_p=0.9, top_k=20, max_new_tokens=40),
        Sampling(temperature=0.0, max_new_tokens=40),
    ],
    ids=["plain", "cold", "hot", "cut", "greedy"],
)
def test_logprobs_are_those_of_a_whole_pass(tried: Tried, sampling: Sampling) -> None:
    asked = requests(16, sampling)
    done = tried.engine.generate(asked)
    check_schema(asked, done)
    check_order(tried, asked, done)


def test_greedy_takes_the_likeliest(tried: Tried) -> None:
    asked = requests(8, Sampling(temperature=0.0, max_new_tokens=20))
    for request, one in zip(asked, tried.engine.generate(asked), strict=True):
        logp_RV = tried.logp_RV([*request.tokens, *one.tokens], len(request.tokens), 1.0)
        chosen_R = logp_RV.gather(1, torch.tensor(one.tokens)[:, None]).squeeze(1)
        assert (logp_RV.max(-1).values - chosen_R).max() <= TOLERANCE, "but for ties"


def test_top_k_and_top_p_bound_what_is_drawn(tried: Tried) -> None:
    asked = requests(16, Sampling(temperature=1.5, top_k=5, max_new_tokens=30))
    for request, one in zip(asked, tried.engine.generate(asked), strict=True):
        logp_RV = tried.logp_RV([*request.tokens, *one.tokens], len(request.tokens), 1.5)
        least_R = logp_RV.topk(5).values[:, -1]
        assert (logp_RV.gather(1, torch.tensor(one.tokens)[:, None]).squeeze(1) >= least_R - TOLERANCE).all()


def test_one_call_may_mix_settings(tried: Tried) -> None:
    asked = [*requests(4, Sampling(max_new_tokens=8)), *requests(4, Sampling(temperature=0.5, max_new_tokens=23))]
    done = tried.engine.generate(asked)
    check_schema(asked, done)
    check_order(tried, asked, done)


def test_new_weights_answer_and_every_token_bears_their_version(tried: Tried, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", "qwen3", seed=1)
    asked = requests(6, Sampling(max_new_tokens=10))
    for folder, version in ((other, 6), (tried.folder, 7)):
        tried.take(folder, version)
        assert tried.engine.version == version
        done = tried.engine.generate(asked)
        check_order(tried, asked, done)
        for one in done:
            assert one.version == version
            assert set(one.versions) == {version}


def test_an_abort_keeps_what_was_written(tried: Tried) -> None:
    asked = requests(64, Sampling(max_new_tokens=450))
    for pause in (0.2, 0.4, 0.8, 1.6):  # until it is neither too early nor too late on this machine
        waiting = threading.Timer(pause, tried.engine.abort)
        waiting.start()
        begin = time.monotonic()
        done = tried.engine.generate(asked)
        waited = time.monotonic() - begin
        waiting.join()
        if any(one.stop is Stop.ABORTED and one.tokens for one in done):
            break
    stops = [one.stop.value for one in done]
    print(f"aborted after {pause} s, back after {waited:.2f} s:", {stop: stops.count(stop) for stop in set(stops)})
    partial = [(request, one) for request, one in zip(asked, done, strict=True) if one.stop is Stop.ABORTED]
    assert any(one.tokens for _, one in partial)
    for request, one in partial:
        assert len(one.tokens) == len(one.logprobs) == len(one.versions) < 450
        assert one.version == tried.engine.version
        expected = tried.logprobs(request.tokens, one.tokens) if one.tokens else []
        assert one.logprobs == pytest.approx(expected, abs=TOLERANCE)
    whole = [(request, one) for request, one in zip(asked, done, strict=True) if one.stop is not Stop.ABORTED]
    check_schema([request for request, _ in whole], [one for _, one in whole])
    again = tried.engine.generate(asked[:4])
    check_schema(asked[:4], again)


def test_given_tokens_are_scored(tried: Tried) -> None:
    given = [
        Given(
            tokens=tuple(3 + (11 * place + index) % (VALID - 3) for place in range(20 + 3 * index)), start=1 + 5 * index
        )
        for index in range(4)
    ]
    for one, scores in zip(given, tried.engine.score(given), strict=True):
        expected = tried.logprobs(one.tokens[: one.start], one.tokens[one.start :])
        assert len(scores) == len(one.tokens) - one.start
        assert scores == pytest.approx(expected, abs=TOLERANCE)


def test_what_was_written_scores_as_it_was_written(tried: Tried) -> None:
    asked = requests(8, Sampling(max_new_tokens=20))
    done = tried.engine.generate(asked)
    given = [
        Given(tokens=request.tokens + one.tokens, start=len(request.tokens))
        for request, one in zip(asked, done, strict=True)
    ]
    for one, scores in zip(done, tried.engine.score(given), strict=True):
        assert scores == pytest.approx(one.logprobs, abs=TOLERANCE)


def test_what_cannot_be_written_is_refused_and_the_engine_lives_on(tried: Tried) -> None:
    asked = requests(2, Sampling(max_new_tokens=4))
    for wrong in (
        Request(tokens=(), sampling=Sampling(max_new_tokens=4), key=(1,)),
        Request(tokens=(5,) * 500, sampling=Sampling(max_new_tokens=100), key=(1,)),
    ):
        with pytest.raises(EngineError):
            tried.engine.generate([*asked, wrong])
    for unscorable in (Given(tokens=(5, 6), start=2), Given(tokens=(5, 6), start=0), Given(tokens=(5,) * 600, start=9)):
        with pytest.raises(EngineError):
            tried.engine.score([unscorable])
    check_schema(asked, tried.engine.generate(asked))
