"""A certificate is worth what it would refuse: one-line faults in a copy of the package, each of which breaks a bar."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Text of one file that is replaced, and the certificate that must notice."""

    file: str
    old: str
    new: str
    objective: str
    cut: str = "whole"
    on: str = "table"


FAULTS = {
    "a dropped MAX all-reduce": Fault(
        file="losses/vocab.py",
        old="if reduce_in_place(sums[:1], dist.ReduceOp.MAX, group):",
        new="if group is not None and group.size() > 1:",
        objective="sft",
        cut="tp=2",
    ),
    "a dropped SUM all-reduce": Fault(
        file="losses/vocab.py",
        old="        reduce_in_place(sums[1:], dist.ReduceOp.SUM, group)\n",
        new="",
        objective="sft",
        cut="tp=2",
    ),
    "a denominator of this rank alone": Fault(
        file="objectives/base.py",
        old="float(batch.counts.tokens), float(batch.counts.sequences)",
        new="float(sum(one.rows for one in batch.micro)), float(batch.counts.sequences)",
        objective="sft",
        cut="dp=2",
    ),
    "a denominator of masked tokens of this rank alone": Fault(
        file="objectives/base.py",
        old="tokens, sequences = scope.total(torch.stack(totals).sum(0)).tolist()",
        new="tokens, sequences = torch.stack(totals).sum(0).tolist()",
        objective="grpo",
        cut="dp=2",
    ),
    "group statistics of this rank alone": Fault(
        file="objectives/base.py",
        old="    return scope.total(sums)\n",
        new="    return sums\n",
        objective="grpo",
        cut="dp=2",
    ),
    "each sequence's mean over its micro-batch": Fault(
        file="objectives/base.py",
        old="one_R / sequence_sums(micro, one_R).clamp(min=1.0)[micro.segment_R]",
        new="one_R / one_R.sum().clamp(min=1.0)",
        objective="sft",
    ),
    "a shifted label": Fault(
        file="data/packing.py",
        old="first = start + len(prompt) - 1",
        new="first = max(start + len(prompt) - 2, 0)",
        objective="sft",
    ),
    "a label of the next sequence": Fault(
        file="data/packing.py",
        old="integers([token for rollout in rollouts for token in rollout.tokens])",
        new="integers([token for rollout in rollouts for token in rollout.tokens]).roll(-1)",
        objective="sft",
    ),
    "positions that do not start again": Fault(
        file="data/packing.py",
        old="integers([position for width in widths for position in range(width)])",
        new="integers([position % 40 for position in range(sum(widths))])",
        objective="sft",
    ),
    "a shifted vocabulary index": Fault(
        file="losses/vocab.py",
        old="local_R = ids_R - reading.partition.start\n",
        new="local_R = ids_R - reading.partition.start + 1\n",
        objective="sft",
    ),
    "unmasked padding": Fault(
        file="types.py",
        old="return min(max(self.valid - self.start, 0), self.width)",
        new="return self.width",
        objective="sft",
    ),
    "a teacher without temperature": Fault(
        file="types.py",
        old="return VocabShard.of(self._logits(), self.partition, temperature)",
        new="return VocabShard.of(self._logits(), self.partition)",
        objective="gkd",
    ),
    "a student without temperature": Fault(
        file="train/step.py",
        old="self.partition, self.objective.temperature",
        new="self.partition, 1.0",
        objective="sft",
    ),
    "beta on the wrong side": Fault(
        file="objectives/gkd.py",
        old='Divergence("jsd", self.beta)',
        new='Divergence("jsd", 1.0 - self.beta if 0 < self.beta < 1 else self.beta)',
        objective="gkd",
    ),
    "weights of another chunk's rows": Fault(
        file="types.py",
        old="return {name: weights[micro][rows] for name, weights in self.weights.items()}",
        new="return {name: weights[micro][: rows.stop - rows.start] for name, weights in self.weights.items()}",
        objective="sft",
        cut="chunks of 4",
    ),
    "the weight's gradient of the last chunk alone": Fault(
        file="losses/chunk.py",
        old="_add_product(weight_grad[: work.valid], grad_Cv.t(), hidden_CH)",
        new="weight_grad[: work.valid] = grad_Cv.t() @ hidden_CH",
        objective="sft",
        cut="chunks of 4",
    ),
    "an estimate differentiated as a loss": Fault(
        file="losses/policy.py",
        old="return -(logp_R - behaviour.detach()).exp() * advantage_R.detach()",
        new="return logp_R - behaviour.detach() - advantage_R.detach()",
        objective="opd",
    ),
    "clip bounds exchanged": Fault(
        file="losses/policy.py",
        old="torch.where(advantage_R >= 0, raised_R, lowered_R)",
        new="torch.where(advantage_R >= 0, lowered_R, raised_R)",
        objective="grpo",
    ),
    "draws by place in the micro-batch": Fault(
        file="objectives/tropd.py",
        old='scope.uniform(length, "trust", index) for index, length in keys',
        new='scope.uniform(length, "trust", place) for place, (_, length) in enumerate(keys)',
        objective="tropd",
        cut="micro-batches of 24 tokens",
    ),
    "sums of a JSD over one shard": Fault(
        file="losses/divergence.py",
        old="*scales, self.beta)\n        reduce_in_place(sums_nR, dist.ReduceOp.SUM, group)\n",
        new="*scales, self.beta)\n",
        objective="gkd",
        cut="tp=2",
    ),
    "sums of the top k over one shard": Fault(
        file="losses/top_k.py",
        old="tail_sum_R, top_sum_R, *picked = all_reduce(local, dist.ReduceOp.SUM, group)",
        new="tail_sum_R, top_sum_R, *picked = local",
        objective="gkd",
        cut="tp=2",
    ),
    "the top k hidden for ever": Fault(
        file="losses/top_k.py",
        old="        self.put(logits_Rv.data, before_RK)\n",
        new="        pass\n",
        objective="gkd",
    ),
    "shares of teachers all equal": Fault(
        file="objectives/_supervision.py",
        old="torch.stack([share * value(teachers[name]) for name, share in shares.items()])",
        new="torch.stack([value(teachers[name]) / len(shares) for name in shares])",
        objective="gkd",
    ),
    "chosen and rejected exchanged": Fault(
        file="objectives/base.py",
        old="return tuple(2.0 * one - 1.0 for one in rewards)",
        new="return tuple(1.0 - 2.0 * one for one in rewards)",
        objective="dpo",
    ),
    "an output weight's gradient in nobody's buffer": Fault(
        file="models/schedule.py",
        old="valid=valid, add_to=buffer)",
        new="valid=valid, add_to=buffer.clone())",
        objective="sft",
        cut="one micro-batch",
        on="network",
    ),
    "losses of context-parallel ranks averaged": Fault(
        file="models/schedule.py",
        old="scale = len(batch.micro) * mesh.sizes.dp * mesh.sizes.cp",
        new="scale = len(batch.micro) * mesh.sizes.dp",
        objective="sft",
        cut="cp=2",
        on="network",
    ),
    "rows of a context-parallel rank in packed order": Fault(
        file="models/network.py",
        old="rows = zigzag_order(context.cu_seqlens, sizes.cp).to(rows.device)[rows]",
        new="pass",
        objective="sft",
        cut="cp=2",
        on="network",
    ),
    "hidden gradients of one vocabulary shard": Fault(
        file="models/network.py",
        old="hidden_RH = copy_to_tensor_model_parallel_region(hidden_RH, group=groups.tp)",
        new="pass",
        objective="sft",
        cut="tp=2 dp=2",
        on="network",
    ),
}


def copy_of_the_project(folder: Path) -> Path:
    for part in ("megatron_distill", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def certify(folder: Path, objectives: str, on: str, cuts: str) -> subprocess.CompletedProcess[str]:
    """A certificate of the copy; the run itself makes sure that it imports nothing from elsewhere."""
    command = [sys.executable, "-m", "tests.certify.run", "--objectives", objectives, "--on", on, "--cuts", cuts]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_breaks_a_bar(tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    path = copy_of_the_project(tmp_path) / "megatron_distill" / fault.file
    source = path.read_text()
    assert source.count(fault.old) == 1, f"{fault.file} no longer has once: {fault.old}"
    path.write_text(source.replace(fault.old, fault.new))
    run = certify(tmp_path, fault.objective, fault.on, fault.cut)
    assert run.returncode == 1, f"not noticed: {run.stdout}{run.stderr}"
    assert re.search(rf"^broken bar: {fault.objective} ", run.stdout, re.MULTILINE), run.stdout + run.stderr


@pytest.mark.parametrize("on", ["table", "network"])
def test_the_copy_itself_is_certified(tmp_path: Path, on: str) -> None:
    faults = [fault for fault in FAULTS.values() if fault.on == on]
    objectives, cuts = sorted({one.objective for one in faults}), sorted({one.cut for one in faults})
    run = certify(copy_of_the_project(tmp_path), ",".join(objectives), on, ";".join(cuts))
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("certified: ")
