import time
from collections.abc import Sequence
from pathlib import Path
from threading import Timer
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_distill.errors import EngineError, ModelError
from megatron_distill.rollout.base import Completion, Given, Request, Sampling, WholeWeights, random_source
from megatron_distill.rollout.embedded import EmbeddedEngine
from megatron_distill.testing.tiny import tiny_model
from megatron_distill.types import Stop

VALID = 250
"""Of 259 columns: the rest is padding that must never be drawn."""
STOP = (2, *range(60, 72))


def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def engine(folder: Path, **fields: Any) -> EmbeddedEngine:
    made = EmbeddedEngine(folder, **({"valid_vocab": VALID, "stop_ids": STOP} | fields))
    made.load_weights(WholeWeights(reference(folder).state_dict().items), version=5)
    return made


def requests(count: int, sampling: Sampling, samples: int = 1) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = [tuple(map(int, rng.integers(3, VALID, size=3 + 2 * (index % 5)))) for index in range(count)]
    return [
        Request(tokens=prompt, sampling=sampling, key=(1, index, number))
        for index, prompt in enumerate(prompts)
        for number in range(samples)
    ]


@torch.no_grad()
def logprobs_by_whole_pass(
    model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float
) -> list[float]:
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, :, :VALID] / temperature
    logp = logits.log_softmax(-1)
    return [float(logp[len(prompt) + place - 1, token]) for place, token in enumerate(response)]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3", hidden=32)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_whole_pass(
    tmp_path: Path, family: Literal["qwen2", "qwen3", "llama"], temperature: float
) -> None:
    folder = tiny_model(tmp_path, family, hidden=32, tied=family == "qwen2")
    asked = requests(6, Sampling(temperature=temperature, max_new_tokens=24), samples=3)
    written = engine(folder, batch_size=7).generate(asked)
    model = reference(folder)
    for request, done in zip(asked, written, strict=True):
        expected = logprobs_by_whole_pass(model, request.tokens, done.tokens, temperature)
        assert done.logprobs == pytest.approx(expected, abs=1e-5)
    assert {done.stop for done in written} == {Stop.EOS, Stop.LENGTH}
    assert len({len(done.tokens) for done in written}) > 4, "rows left the batch at different turns"


def test_responses_end_at_the_first_stop_id(qwen3: Path) -> None:
    for done in engine(qwen3).generate(requests(20, Sampling(max_new_tokens=30))):
        assert not set(done.tokens[:-1]) & set(STOP)
        assert max(done.tokens) < VALID
        assert (done.stop is Stop.EOS) == (done.tokens[-1] in STOP)
        assert len(done.tokens) == 30 or done.stop is Stop.EOS
        assert len(done.logprobs) == len(done.tokens)
        assert done.version == 5


def test_greedy_takes_the_likeliest(qwen3: Path) -> None:
    model = reference(qwen3)
    asked = requests(4, Sampling(temperature=0, max_new_tokens=12))
    for request, done in zip(asked, engine(qwen3).generate(asked), strict=True):
        tokens = list(request.tokens)
        for token in done.tokens:
            with torch.no_grad():
                assert int(model(torch.tensor([tokens])).logits[0, -1, :VALID].argmax()) == token
            tokens.append(token)
        assert done.logprobs == pytest.approx(logprobs_by_whole_pass(model, request.tokens, done.tokens, 1.0), abs=1e-5)


def test_draws_do_not_depend_on_company_order_or_batch_size(qwen3: Path) -> None:
    asked = requests(12, Sampling(max_new_tokens=20), samples=2)
    together = engine(qwen3).generate(asked)
    in_threes = engine(qwen3, batch_size=3).generate(asked[::-1])[::-1]
    alone = [engine(qwen3).generate([request])[0] for request in asked[:4]]
    assert [done.tokens for done in in_threes] == [done.tokens for done in together]
    assert [done.tokens for done in alone] == [done.tokens for done in together[:4]]
    other_key = [Request(tokens=one.tokens, sampling=one.sampling, key=("other", *one.key)) for one in asked]
    assert [done.tokens for done in engine(qwen3).generate(other_key)] != [done.tokens for done in together]


def test_samples_follow_the_distribution(qwen3: Path) -> None:
    """First tokens of 4,000 draws against the model's own probabilities: chi-square within 5 sigma."""
    prompt, draws = (5, 6, 7), 4000
    sampling = Sampling(temperature=0.8, max_new_tokens=1)
    asked = [Request(tokens=prompt, sampling=sampling, key=(index,)) for index in range(draws)]
    counts = np.bincount([done.tokens[0] for done in engine(qwen3).generate(asked)], minlength=VALID)
    with torch.no_grad():
        logits = reference(qwen3)(torch.tensor([prompt])).logits[0, -1, :VALID] / 0.8
    expected = draws * logits.double().softmax(-1).numpy()
    likely = expected >= 5
    statistic = (((counts - expected) ** 2 / expected)[likely]).sum()
    assert abs(statistic - likely.sum()) < 5 * np.sqrt(2 * likely.sum())


def first_tokens(folder: Path, **sampling: Any) -> tuple[set[int], torch.Tensor]:
    asked = [
        Request(tokens=(5, 6, 7), sampling=Sampling(max_new_tokens=1, **sampling), key=(index,))
        for index in range(1500)
    ]
    with torch.no_grad():
        logp = reference(folder)(torch.tensor([(5, 6, 7)])).logits[0, -1, :VALID].log_softmax(-1)
    written = engine(folder).generate(asked)
    assert all(done.logprobs[0] == pytest.approx(float(logp[done.tokens[0]]), abs=1e-5) for done in written)
    return {done.tokens[0] for done in written}, logp


def test_top_k_draws_from_the_k_likeliest(qwen3: Path) -> None:
    drawn, logp = first_tokens(qwen3, top_k=4)
    assert drawn == set(logp.topk(4).indices.tolist())


def test_top_p_draws_from_the_fewest_that_hold_p(qwen3: Path) -> None:
    drawn, logp = first_tokens(qwen3, top_p=0.3)
    ordered = logp.exp().sort(descending=True)
    needed = int((ordered.values.cumsum(0) < 0.3).sum()) + 1
    assert drawn <= set(ordered.indices[:needed].tolist())
    assert len(drawn) > 0.8 * needed


def test_mixed_sampling_in_one_call(qwen3: Path) -> None:
    greedy, drawn = Sampling(temperature=0, max_new_tokens=5), Sampling(max_new_tokens=9)
    asked = requests(4, greedy) + requests(4, drawn)
    mixed = engine(qwen3).generate([one for pair in zip(asked[:4], asked[4:], strict=True) for one in pair])
    assert mixed[0::2] == engine(qwen3).generate(asked[:4])
    assert [done.tokens for done in mixed[1::2]] == [done.tokens for done in engine(qwen3).generate(asked[4:])]


def test_scores_are_those_of_generation(qwen3: Path) -> None:
    asked = requests(9, Sampling(temperature=1.3, max_new_tokens=15))
    made = engine(qwen3, batch_size=4)
    written: list[Completion] = made.generate(asked)
    given = [
        Given(tokens=one.tokens + done.tokens, start=len(one.tokens)) for one, done in zip(asked, written, strict=True)
    ]
    for scores, done in zip(made.score(given, temperature=1.3), written, strict=True):
        assert scores == pytest.approx(done.logprobs, abs=1e-5)
    assert made.score([]) == []


def test_new_weights_change_the_rollouts(qwen3: Path, tmp_path: Path) -> None:
    asked = requests(4, Sampling(temperature=0, max_new_tokens=10))
    made = engine(qwen3)
    before = made.generate(asked)
    other = reference(tiny_model(tmp_path, "qwen3", hidden=32, seed=9))
    made.load_weights(WholeWeights(other.state_dict().items), version=6)
    after = made.generate(asked)
    assert after[0].version == 6
    assert [done.tokens for done in after] != [done.tokens for done in before]
    fresh = EmbeddedEngine(qwen3, valid_vocab=VALID, stop_ids=STOP)
    fresh.load_weights(WholeWeights(other.state_dict().items), version=6)
    assert after == fresh.generate(asked)


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_or_an_error(tmp_path: Path, tied: bool) -> None:
    folder = tiny_model(tmp_path, "llama", tied=tied, hidden=32)
    made = EmbeddedEngine(folder, valid_vocab=VALID, stop_ids=STOP)
    weights = dict(reference(folder).state_dict())
    without_head = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    if tied:
        made.load_weights(WholeWeights(without_head.items), version=0)
    else:
        with pytest.raises(EngineError, match=r"1 weights were not given, the first is lm_head\.weight"):
            made.load_weights(WholeWeights(without_head.items), version=0)
    made.load_weights(WholeWeights(weights.items), version=0)
    with pytest.raises(EngineError, match=r"weight model\.extra: the engine's model has no such parameter"):
        made.load_weights(WholeWeights((weights | {"model.extra": torch.zeros(1)}).items), version=1)
    name = "model.norm.weight"
    with pytest.raises(EngineError, match=r"weight model\.norm\.weight: shape \(3,\), expected \(32,\)"):
        made.load_weights(WholeWeights((weights | {name: torch.zeros(3)}).items), version=1)


def test_requests_that_cannot_be_served(qwen3: Path) -> None:
    with pytest.raises(EngineError, match="no weights yet"):
        EmbeddedEngine(qwen3, valid_vocab=VALID, stop_ids=STOP).generate(requests(1, Sampling()))
    made = engine(qwen3)
    with pytest.raises(EngineError, match="must fit in the model's 512 positions"):
        made.generate([Request(tokens=(1,) * 300, sampling=Sampling(max_new_tokens=213), key=())])
    with pytest.raises(EngineError, match="a prompt has a token"):
        made.generate([Request(tokens=(), sampling=Sampling(), key=())])
    with pytest.raises(EngineError, match=r"start=0 of 2 tokens"):
        made.score([Given(tokens=(1, 2), start=0)])
    assert made.generate([]) == []


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        EmbeddedEngine(tmp_path, valid_vocab=VALID, stop_ids=STOP)
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        EmbeddedEngine(tmp_path, valid_vocab=VALID, stop_ids=STOP)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("max_new_tokens", 0)]
)
def test_sampling_is_checked(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}: must be"):
        Sampling(**{field: value})


def test_random_source_is_fixed_by_its_key() -> None:
    """The numbers themselves: a run resumed after an upgrade must draw what it would have drawn."""
    assert random_source((1, "rollout", 2)).random(2).tolist() == [0.05068027049853763, 0.5335539481638114]
    assert random_source((1, "rollout", 2)).random() != random_source((1, "rollout", 3)).random()


def test_an_abort_from_another_thread_gives_back_what_was_written(qwen3: Path) -> None:
    made = engine(qwen3, batch_size=2, stop_ids=())
    asked = requests(4, Sampling(max_new_tokens=200))
    whole = made.generate(asked)
    begin = time.perf_counter()
    made.generate(asked)
    timer = Timer((time.perf_counter() - begin) / 4, made.abort)
    timer.start()
    partial = made.generate(asked)
    timer.join()
    for before, after in zip(whole, partial, strict=True):
        assert after.tokens == before.tokens[: len(after.tokens)]
        assert after.logprobs == before.logprobs[: len(after.tokens)]
        assert (after.stop is Stop.ABORTED) == (len(after.tokens) < len(before.tokens))
    assert partial[0] != whole[0] or partial[-1] != whole[-1]
    assert made.generate(asked) == whole, "the next call is whole again"
