"""Answers as SGLang 0.5.23 gave them, and what is said of those that are spoiled."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_distill.rollout import wire
from megatron_distill.rollout.base import Completion, Given, Request, Sampling
from megatron_distill.types import Stop

WRITTEN = """{"output_ids":[89,95,2],"meta_info":{"id":"r-1","finish_reason":{"type":"stop","matched":2},
"prompt_tokens":3,"weight_version":"4","num_retractions":0,"input_token_logprobs":[],
"output_token_logprobs":[[-6.737581729888916,89,null],[-5.853133201599121,95,null],[-5.508458614349365,2,null]],
"output_token_logprobs_length":3,"completion_tokens":3,"cached_tokens":2,
"weight_versions":[{"version":"3","start":0,"end":2},{"version":"4","start":2,"end":3}],"dp_rank":null}}"""

SCORED = """{"output_ids":[],"meta_info":{"id":"r-1","finish_reason":{"type":"length","length":0},"prompt_tokens":4,
"weight_version":"3","input_token_logprobs":[[null,6,null],[-7.755748748779297,7,null],[-5.582183837890625,8,null]],
"output_token_logprobs":[],"input_top_logprobs_val_flat_b64":"JaYkwL6eS8C+sizAjfBpwA==",
"input_top_logprobs_idx_flat_b64":"ggAAAFAAAACCAAAAUAAAAA==","input_top_logprobs_val_flat_b64_dtype":"float32",
"input_top_logprobs_idx_flat_b64_dtype":"int32","input_top_logprobs_shape":[2,2],"input_top_logprobs_null_prefix":1,
"weight_versions":[{"version":"3","start":0,"end":0}],"cached_tokens":1}}"""

GIVEN = Given(tokens=(5, 6, 7, 8), start=2)


def written() -> Any:
    return json.loads(WRITTEN)


def scored() -> Any:
    return json.loads(SCORED)


def test_a_response_is_read_with_the_version_of_each_token() -> None:
    assert wire.completion(written(), stop_ids=(2,), longest=9) == Completion(
        tokens=(89, 95, 2),
        logprobs=(-6.737581729888916, -5.853133201599121, -5.508458614349365),
        stop=Stop.EOS,
        version=3,
        versions=(3, 3, 4),
    )


def test_a_server_that_tells_one_version_tells_it_of_all_tokens() -> None:
    answer = written()
    del answer["meta_info"]["weight_versions"]
    assert wire.completion(answer, stop_ids=(2,), longest=9).versions == (4, 4, 4)


def test_a_response_that_was_aborted_before_its_first_token_is_empty() -> None:
    answer = written()
    answer["output_ids"] = []
    answer["meta_info"] |= {
        "output_token_logprobs": [],
        "finish_reason": {"type": "abort", "message": "Aborted"},
        "weight_versions": [{"version": "4", "start": 0, "end": 0}],
    }
    done = wire.completion(answer, stop_ids=(2,), longest=9)
    assert (done.tokens, done.stop, done.version, done.versions) == ((), Stop.ABORTED, 4, ())


def change(path: str, value: Any) -> Callable[[Any], None]:
    *parents, last = path.split(".")

    def apply(answer: Any) -> None:
        for name in parents:
            answer = answer[name]
        answer[last] = value

    return apply


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (change("meta_info", None), "meta_info is missing"),
        (change("output_ids", "89"), "output_ids is str, expected list"),
        (change("output_ids", [89, 95, 2.0]), "something else than integers"),
        (change("output_ids", [89, 95]), "log-probs of 3 tokens do not belong to the 2 tokens"),
        (change("meta_info.output_token_logprobs", None), "output_token_logprobs is missing"),
        (change("meta_info.output_token_logprobs", [[None, 89], [-1, 95], [-1, 2]]), "no number"),
        (change("meta_info.output_token_logprobs", [[0.5, 89], [-1, 95], [-1, 2]]), "above 0"),
        (change("meta_info.finish_reason", {"type": "stop", "matched": 7}), "stop"),
        (change("meta_info.finish_reason", {"type": "weather"}), "finish_reason.type='weather'"),
        (change("meta_info.finish_reason", {"type": "length", "length": 3}), "after 3 of 9 tokens: its context_length"),
        (change("meta_info.weight_versions", [{"version": "3", "start": 0, "end": 2}]), "cover 2 of 3"),
        (change("meta_info.weight_versions", [{"version": "3", "start": 1, "end": 3}]), "gap before token 1"),
    ],
)
def test_a_spoiled_response_is_refused_in_words(spoil: Callable[[Any], None], told: str) -> None:
    answer = written()
    spoil(answer)
    if told == "stop":  # an end that this run does not know
        with pytest.raises(ValueError, match=r"ended at id 7.*generation_config\.json"):
            wire.completion(answer, stop_ids=(5,), longest=9)
    else:
        with pytest.raises(ValueError, match=told):
            wire.completion(answer, stop_ids=(2,), longest=9)


@pytest.mark.parametrize("version", ["default", "updating", "", "-1", "3.0"])
def test_a_version_that_is_no_number_of_steps_is_unknown(version: str) -> None:
    answer = written()
    answer["meta_info"]["weight_versions"][1]["version"] = version
    with pytest.raises(wire.UnknownVersion, match="no number of optimizer steps"):
        wire.completion(answer, stop_ids=(2,), longest=9)


def test_scores_are_those_of_the_response_alone() -> None:
    found = wire.scores(scored(), GIVEN, top_k=2, left_out=(), vocab_size=131)
    np.testing.assert_allclose(found.logprobs, [-7.7557487, -5.5821838], rtol=1e-6)
    assert found.top_ids is not None
    assert found.top_logprobs is not None
    assert found.top_ids.tolist() == [[130, 80], [130, 80]]
    np.testing.assert_allclose(found.top_logprobs[0], [-2.572641, -3.181564], rtol=1e-5)
    assert (found.logprobs.dtype, found.top_ids.dtype, found.top_logprobs.dtype) == ("float32", "int32", "float32")
    assert (found.version, found.cached) == ("3", 1)


def test_the_last_id_of_the_vocabulary_is_told_as_0() -> None:
    answer = scored()
    given = Given(tokens=(*GIVEN.tokens[:-1], 130), start=GIVEN.start)
    with pytest.raises(ValueError, match=r"asked for the 2 \[7, 0\]"):
        wire.scores(answer, given, top_k=2, left_out=(), vocab_size=131)
    answer["meta_info"]["input_token_logprobs"][-1][1] = 0
    assert wire.scores(answer, given, top_k=2, left_out=(), vocab_size=131).logprobs.shape == (2,)


def test_ids_left_out_are_left_out_of_normaliser_and_top_k() -> None:
    answer = scored()
    answer["meta_info"]["input_token_ids_logprobs"] = [None, [[np.log(0.2), 130, None]], [[np.log(0.5), 130, None]]]
    found = wire.scores(answer, GIVEN, top_k=2, left_out=(130,), vocab_size=131)
    np.testing.assert_allclose(found.logprobs, np.array([-7.7557487, -5.5821838]) - np.log([0.8, 0.5]), rtol=1e-6)
    assert found.top_ids is not None
    assert found.top_logprobs is not None
    assert found.top_ids.tolist() == [[80], [80]]
    np.testing.assert_allclose(
        found.top_logprobs[:, 0], np.array([-3.181564, -3.655307]) - np.log([0.8, 0.5]), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            change("meta_info.input_token_logprobs", [[None, 6], [-1.0, 7]]),
            r"1 tokens \[7\], asked for the 2 \[7, 8\]",
        ),
        (
            change("meta_info.input_token_logprobs", [[None, 6], [-1.0, 7], [-1.0, 9]]),
            r"\[7, 9\], asked for the 2 \[7, 8\]",
        ),
        (change("meta_info.input_top_logprobs_shape", [2, 3]), r"shape \(2, 3\), expected \(2, 2\)"),
        (change("meta_info.input_top_logprobs_val_flat_b64", "!!"), "no base64"),
        (change("meta_info.input_top_logprobs_val_flat_b64", b64encode(b"1234").decode()), "1 numbers, expected 2 x 2"),
        (change("meta_info.input_top_logprobs_val_flat_b64", b64encode(b"12345").decode()), "multiple of element size"),
        (change("meta_info.input_top_logprobs_val_flat_b64_dtype", "float16"), "float16, expected float32"),
    ],
)
def test_spoiled_scores_are_refused_in_words(spoil: Callable[[Any], None], told: str) -> None:
    answer = scored()
    spoil(answer)
    with pytest.raises(ValueError, match=told):
        wire.scores(answer, GIVEN, top_k=2, left_out=(), vocab_size=131)


def test_greedy_and_all_are_said_as_the_server_says_them() -> None:
    request = Request(tokens=(5,), sampling=Sampling(temperature=0, top_k=0, top_p=0.9, max_new_tokens=7), key=(1,))
    body = wire.generation(request, "r-1", stop_ids=(2, 3), forbidden={"9": wire.FORBIDDEN})
    settings = body["sampling_params"]
    assert (settings["temperature"], settings["top_k"], settings["top_p"]) == (0, -1, 0.9)
    assert (settings["stop_token_ids"], settings["logit_bias"]) == ([2, 3], {"9": wire.FORBIDDEN})
    assert settings["sampling_seed"] == wire.generation(request, "r-2", (), {})["sampling_params"]["sampling_seed"]
    assert 0 <= settings["sampling_seed"] < 2**31


def test_what_a_server_tells_of_its_keys_is_not_kept() -> None:
    model = {"model_path": "m", "served_model_name": "m", "weight_version": "0", "architectures": ["Qwen3ForCausalLM"]}
    server = {"max_req_input_len": 506, "tp_size": 1, "version": "0.5.23", "api_key": "secret"}
    server |= {
        "launch_command": "python --api-key secret",
        "internal_states": [{"api_key": "secret"}],
        "dtype": "float32",
    }
    found = wire.info(model, server, {"data": [{"max_model_len": 512}]}, vocab_size=259)
    assert "secret" not in repr(found)
    assert (found.longest_prompt, found.longest, found.context_length) == (505, 510, 512)
    assert found.settings["dtype"] == "float32"
    assert found.settings["architectures"] == ["Qwen3ForCausalLM"]
