from dataclasses import replace

from megatron_distill.train.describe import describe_staleness
from megatron_distill.types import Metric, Origin, Prompt, Rollout, Stop

STUDENT, TEACHER = Origin.STUDENT, Origin.TEACHER


def rollout(versions: tuple[int, ...], origin: tuple[Origin, ...]) -> Rollout:
    return Rollout(
        prompt=Prompt(id="a", messages=(), tokens=(1,)),
        group="a",
        sample=0,
        tokens=tuple(range(len(versions))),
        logprobs=None,
        origin=origin,
        stop=Stop.EOS,
        version=min(versions),
        versions=versions,
    )


def test_staleness_is_counted_over_tokens_that_the_student_sampled() -> None:
    mixed = rollout((3, 5, 5), (STUDENT,) * 3)
    guided = rollout((4, 4), (TEACHER, STUDENT))
    assert describe_staleness([mixed, guided], step=5) == [
        Metric("rollout/staleness_mean", 2 + 0 + 0 + 1, 4),
        Metric("rollout/staleness_max", 2),
    ]
    assert describe_staleness([replace(guided, origin=(TEACHER,) * 2)], step=5) == []
