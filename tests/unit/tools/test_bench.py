"""The bench measures what it says: order and medians, bytes, equal work, bars; a results file that can be shared."""

import json
import socket
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tools.bench import bars, comparisons, figures, machine, overlap, report, rivals, step
from tools.bench.collectives import EXPECTED, counted
from tools.bench.comparisons import COMPILED, EAGER, MEGATRON, MEGATRON_FUSED, NAIVE, OURS, Contender, admit
from tools.bench.equal import errors
from tools.bench.memory import high_water, highest, peak_beyond_inputs
from tools.bench.timing import Method, ProcessorTime, Samples, interleave, order, ratio
from tools.bench.work import BETA, REFERENCES, Hidden, Logits, Shape

TINY = Shape(rows=5, vocab=300)
LINEAR = Shape(rows=12, vocab=96, hidden=8, teacher_hidden=16, chunk=5)


class Script:
    """A clock that reads off what a run returns."""

    def time(self, run):
        return float(run())


def scripted(name, answers, log):
    remaining = iter(answers)

    def run():
        log.append(name)
        return next(remaining)

    return Method(name=name, run=run, prepare=lambda: log.append(f"prepare {name}"))


def test_methods_take_turns_and_are_prepared_each_time():
    log = []
    methods = [scripted("a", range(9), log), scripted("b", range(9), log), scripted("c", range(9), log)]
    interleave(methods, rounds=3, watch=Script(), warm_up=1)
    assert log[:6] == ["prepare a", "a", "prepare b", "b", "prepare c", "c"]
    assert log[6:][1::2] == ["a", "b", "c", "b", "a", "c", "c", "a", "b"]
    assert log[0::2] == [f"prepare {name}" for name in log[1::2]]


def test_every_place_in_a_round_comes_round():
    methods = [Method(name=name, run=lambda: None) for name in "abcd"]
    first = {order(methods, number)[0].name for number in range(8)}
    assert first == set("abcd")
    assert all(sorted(method.name for method in order(methods, number)) == list("abcd") for number in range(8))


def test_warm_up_is_not_counted_and_the_median_is():
    found = interleave([scripted("a", [99, 98, 3, 1, 2, 50, 4], [])], rounds=5, watch=Script(), warm_up=2)
    assert found["a"] == Samples((3.0, 1.0, 2.0, 50.0, 4.0))
    assert (found["a"].median, found["a"].best) == (3.0, 1.0)


def test_a_ratio_is_ours_over_theirs():
    times = {"ours": Samples((2.0, 1.0, 3.0)), "theirs": Samples((4.0, 5.0, 3.0))}
    found = ratio(times, "ours", "theirs")
    assert found.median == 2.0 / 4.0
    assert found.best == 1.0 / 3.0
    assert found.spread == (0.2, 1.0)


def test_processor_time_does_not_count_waiting():
    assert ProcessorTime().time(lambda: time.sleep(0.2)) < 100
    assert ProcessorTime().time(lambda: sum(range(3_000_000))) > 5


def test_the_highest_point_of_a_running_sum():
    assert highest([]) == 0
    assert highest([5, -5, 3, 4, -7, 6]) == 7


def test_memory_meter_on_known_allocations():
    size = 2**18

    def run():
        one = torch.ones(size)
        two = one * 2
        del one
        three = two + 1
        return three + two  # three are alive: `two`, `three` and the sum

    assert peak_beyond_inputs(run) == 3 * 4 * size


def test_memory_meter_sees_in_place_work_as_none():
    there = torch.ones(2**18)
    assert peak_beyond_inputs(lambda: there.mul_(2).exp_()) < 100  # the number 2 is a tensor too


def test_the_kernel_sees_large_buffers_too():
    seen = high_water(lambda: torch.ones(2**25))
    assert seen is not None
    assert 0.9 < seen / 2**27 < 1.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", REFERENCES)
def test_ours_and_the_naive_code_are_equal_work(loss, dtype):
    shape = Shape(rows=5, vocab=300, dtype=dtype)
    inputs = Logits(shape)
    columns = comparisons.ours.partition(shape.vocab)
    mine = comparisons._on_logits(EAGER, comparisons.ours.logit_loss(loss, columns), inputs, 1.0, "eager")
    naive = comparisons._on_logits(NAIVE, rivals.naive(loss, compiled=False), inputs, 1.0)
    admitted, told = admit([mine, naive], shape, inputs.expected(loss))
    assert len(admitted) == 2, told


@pytest.mark.parametrize("loss", comparisons.LINEAR_LOSSES)
def test_fused_linear_and_the_naive_code_are_equal_work(loss):
    inputs = Hidden(LINEAR)
    mine = comparisons._on_hidden(EAGER, comparisons.ours.linear(loss), inputs, 1.0, "eager")
    naive = comparisons._on_hidden(NAIVE, rivals.naive_linear(loss), inputs, 1.0)
    admitted, told = admit([mine, naive], LINEAR, inputs.expected(loss))
    assert len(admitted) == 2, told


def test_the_floor_does_three_student_products_and_one_of_the_teacher():
    inputs = Hidden(LINEAR)
    with FlopCounterMode(display=False) as counting:
        hidden_grad, weight_grad = rivals.gemm_floor(inputs)
    hidden_RH, weight_VH = inputs.hidden_RH.detach(), inputs.weight_VH.detach()
    logits_RV = hidden_RH @ weight_VH.t()
    torch.testing.assert_close(hidden_grad, logits_RV @ weight_VH)
    torch.testing.assert_close(weight_grad, logits_RV.t() @ hidden_RH)
    # the counter does not know addmm_, the third of the student's products
    assert counting.get_total_flops() == 2 * LINEAR.rows * LINEAR.vocab * (2 * LINEAR.hidden + LINEAR.teacher_hidden)


def contender(inputs, gradient_factor=1.0, loss_factor=1.0, copies=1.0):
    def run():
        value_R = rivals.naive_forward_kl(inputs.student_RV, inputs.teacher_RV)
        (gradient,) = torch.autograd.grad(value_R.sum(), inputs.student_RV)
        return value_R.detach() * loss_factor, (gradient * gradient_factor,)

    return Contender(name="them", run=run, prepare=inputs.restore, copies=copies)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"gradient_factor": 1.01}, "gradient off by 1.0e-02"),
        ({"loss_factor": 0.99}, "loss off by 1.0e-02"),
        ({"gradient_factor": float("nan")}, "gradient off by nan"),
    ],
)
def test_a_rival_that_is_wrong_is_refused(wrong, says):
    inputs = Logits(TINY)
    expected = inputs.expected("forward_kl")
    assert admit([contender(inputs)], TINY, expected)[1]["them"]["refused"] is None
    admitted, told = admit([contender(inputs, **wrong)], TINY, expected)
    assert not admitted
    assert says in told["them"]["refused"]


def test_a_rival_that_does_not_fit_is_left_out_and_not_run():
    shape = Shape(rows=1024, vocab=151936)
    large = Contender(name="them", run=lambda: pytest.fail("was run"), prepare=lambda: None, copies=15.0)
    admitted, told = admit([large], shape, Logits(TINY).expected("forward_kl"), room_gib=4.0)
    assert not admitted
    assert told["them"]["refused"] == "needs some 9 GiB, 4 are free"


def test_a_sum_is_held_against_the_sum():
    inputs = Logits(TINY)
    expected = inputs.expected("forward_kl")
    assert errors(expected.loss_R.sum(), expected.gradients, expected).loss == 0.0
    assert errors(expected.loss_R.sum() / 2, expected.gradients, expected).loss == pytest.approx(0.5)


def test_restore_puts_back_what_a_run_overwrote():
    inputs = Logits(TINY)
    before = inputs.student_RV.detach().clone()
    inputs.student_RV.data.zero_()
    inputs.restore()
    assert torch.equal(inputs.student_RV, before)


def test_bench_and_oracle_agree_on_which_model_beta_weights():
    inputs = Logits(TINY)
    p, q = inputs.teacher_RV.double().softmax(-1), inputs.student_RV.detach().double().softmax(-1)
    m = BETA * p + (1 - BETA) * q
    expected_R = BETA * (p * (p / m).log()).sum(-1) + (1 - BETA) * (q * (q / m).log()).sum(-1)
    assert inputs.expected("jsd").loss_R == pytest.approx(expected_R)


def measured(ms, **more):
    return {"refused": None, "loss_error": 1e-6, "gradient_error": 1e-6, "median_ms": ms, "best_ms": ms} | {
        "ms": [ms] * 5,
        **more,
    }


def document():
    methods = {
        OURS: measured(10.0, peak_bytes=600, peak_copies=0.05, resident_copies=0.06),
        NAIVE: measured(30.0, peak_bytes=30000, peak_copies=5.0, resident_copies=None),
        COMPILED: measured(10.5, peak_bytes=6000, peak_copies=1.0, resident_copies=1.0),
    }
    one = {"shape": asdict(TINY), "loss": "forward_kl", "measured": {"date": "2026-01-01"}, "methods": methods}
    labels = [label for loss in EXPECTED for label in (loss, f"{loss}, eager")]
    counts = {label: {"forward": EXPECTED[label.split(",")[0]], "backward": 0} for label in labels}
    return [one], counts | {MEGATRON: {"forward": 3, "backward": 0}, MEGATRON_FUSED: {"forward": 2, "backward": 0}}


def test_bars_are_held_against_medians():
    verdicts = {one.what: one for one in bars.judge(TINY, "forward_kl", document()[0][0]["methods"])}
    assert verdicts[f"forward_kl: time / {NAIVE}"].passed
    assert not verdicts[f"forward_kl: time / {COMPILED}"].passed
    assert verdicts[f"forward_kl: time / {COMPILED}"].measured == pytest.approx(10 / 10.5)
    assert verdicts["forward_kl: peak beyond inputs, [T, V] copies"].passed


def test_a_rival_left_out_fails_no_bar_and_is_told():
    methods = document()[0][0]["methods"]
    methods[NAIVE] = {"refused": "needs some 9 GiB, 4 are free"}
    verdicts = {one.what: one for one in bars.judge(TINY, "forward_kl", methods)}
    one = verdicts[f"forward_kl: time / {NAIVE}"]
    assert one.passed
    assert one.measured is None
    assert "9 GiB" in one.note


def test_ours_refused_fails():
    methods = document()[0][0]["methods"] | {OURS: {"refused": "gradient off by 3.0e-01"}}
    assert not bars.all_passed(bars.judge(TINY, "forward_kl", methods))


def test_memory_of_fused_linear_is_chunks_beyond_the_gradients():
    gradients = 4 * (LINEAR.rows + LINEAR.vocab) * LINEAR.hidden
    chunk = 4 * LINEAR.chunk * LINEAR.vocab
    methods = {name: measured(10.0) for name in (comparisons.FLOOR, comparisons.LIGER_COMPILED)}
    for chunks, passed in ((2, True), (3, False)):
        mine = measured(10.0, peak_bytes=gradients + chunks * chunk, peak_copies=1.0)
        verdicts = bars.judge(LINEAR, "jsd", methods | {OURS: mine})
        (memory,) = [one for one in verdicts if "peak" in one.what]
        assert memory.measured == chunks
        assert memory.passed is passed


@pytest.mark.parametrize("change", [{"forward": 3}, {"backward": 1}, {"forward": 1}])
def test_any_other_number_of_collectives_fails(change):
    counts = document()[1]
    assert bars.all_passed(bars.judge_collectives(counts))
    counts["forward_kl"] |= change
    assert not bars.all_passed(bars.judge_collectives(counts))


def test_collectives_are_counted_and_still_work(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        one = torch.ones(3)
        with counted() as calls:
            torch.distributed.all_reduce(one)
            torch.distributed.barrier()
        torch.distributed.all_reduce(one)
    finally:
        torch.distributed.destroy_process_group()
    assert calls == {"all_reduce": 1, "barrier": 1}
    assert one.tolist() == [1.0] * 3


def test_the_results_file_has_the_machine_and_no_address(tmp_path, capsys):
    comparisons_done, counts = document()
    found = report.assemble(comparisons_done, counts)
    assert found.keys() == {"clock", "compared_with", "bars", "passed", "collectives", "comparisons"}
    assert found["passed"] is False
    assert {bar["what"]: bar["passed"] for bar in found["bars"]}[f"forward_kl: time / {NAIVE}"]
    path = machine.write_results("losses", found, tmp_path)
    assert path == tmp_path / machine.hardware() / "losses.json"
    text = path.read_text(encoding="utf-8")
    known = json.loads(text)["machine"]
    assert known.keys() >= {"device", "cores", "threads", "packages", "git_revision", "date", "memory_gib"}
    assert socket.gethostname() not in text
    assert str(Path.cwd()) not in text
    assert machine.read_results("losses", tmp_path) == json.loads(text)
    assert machine.read_results("step", tmp_path) is None


def test_a_comparison_measured_again_replaces_the_earlier_one():
    (one,), _ = document()
    other = one | {"loss": "jsd"}
    newer = one | {"measured": {"date": "2026-02-02"}}
    assert report.merged({"comparisons": [one, other]}, [newer]) == [newer, other]
    assert report.merged(None, [one]) == [one]


def test_steps_are_summarised_by_phase_without_the_first():
    def line(number, seconds):
        phases = {f"time/{phase}_s": seconds / 10 for phase in step.PHASES}
        of_all = {"batch/tokens": 100.0, "perf/tokens_per_s": 100 / seconds, "memory/peak_gib": seconds}
        return {"step": number, "time/step_s": seconds, **of_all, **phases}

    lines = [line(1, 90.0), line(2, 80.0), line(3, 1.0), line(4, 2.0), line(5, 4.0)]
    found = step.summarise(step.counted(lines))
    assert (found["steps"], found["step_s"], found["tokens_per_s"], found["peak_gib"]) == (3, 2.0, 50.0, 4.0)
    assert found["phases_s"] == dict.fromkeys(step.PHASES, 0.2)


def test_a_step_with_rollouts_ahead_is_a_share_of_its_longer_half():
    def line(waited, rest, writing):
        return {"time/step_s": waited + rest, "time/rollout_s": waited, "engine/writing_s": writing}

    # the second batch is written beside the first step and waited for in the second: 4 + 1 s, of which writing took 4.5
    assert overlap.shares([line(9.0, 4.0, 9.0), line(1.0, 5.0, 4.5), line(0.5, 3.0, 2.0)]) == [5 / 4.5, 5.5 / 5]


def test_the_step_bench_writes_a_config_that_can_be_run(tmp_path):
    from megatron_distill.config import check, load

    case = next(case for case in step.CASES if case.name == "tiny, opd")
    run = load(str(step.prepare(case, tmp_path)), list(case.settings))
    check(run)
    assert run.train.prompts_per_step == case.size.prompts


def test_the_guide_shows_the_results_files_as_they_are():
    guide = figures.GUIDE.read_text(encoding="utf-8")
    assert figures.with_figures(guide) == guide, "run python -m tools.bench.figures"


def test_figures_tell_who_was_left_out_and_what_was_missed(tmp_path):
    (one,), counts = document()
    one["methods"]["TRL"] = {"refused": "needs some 9 GiB, 4 are free"}
    one["measured"]["rounds"] = 5
    machine.write_results("losses", report.assemble([one], counts), tmp_path)
    text = figures.with_figures(f"before {figures.BEGIN} old {figures.END} after", tmp_path)
    assert "old" not in text
    assert text.startswith("before")
    assert text.endswith("after")
    assert "| TRL | left out: needs some 9 GiB, 4 are free |" in text
    assert "| naive | 30 (30) | 0.33 (0.33) | 5.000 | 1e-06 | 1e-06 |" in text
    assert f"| forward_kl: time / {COMPILED} | {TINY.name} | 0.9 | 0.952 | 0.952 | **missed** |" in text


@pytest.mark.slow
def test_a_whole_comparison_in_processes_of_its_own():
    from tools.bench.losses import measure

    (found,) = measure(Shape(rows=8, vocab=2048), rounds=2, losses=["logprob"])
    methods = found["methods"]
    assert methods.keys() >= {OURS, EAGER, NAIVE, COMPILED, MEGATRON}
    assert "gradient off" in methods[MEGATRON_FUSED]["refused"]
    for name in (OURS, NAIVE, MEGATRON):
        assert len(methods[name]["ms"]) == 2
        assert methods[name]["peak_bytes"] >= 0
    assert bars.judge(Shape(**found["shape"]), "logprob", methods)
