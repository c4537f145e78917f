"""Hugging Face folder <-> Megatron checkpoint, and proof that they are the same model.

    python -m tools.convert to-megatron HF_FOLDER OUT
    python -m tools.convert to-hf CHECKPOINT OUT
    python -m tools.convert verify HF_FOLDER [CHECKPOINT]

The library does the work; here are only the arguments. Megatron's checkpoint format holds pickled metadata, which
may run code when read: `to-hf` and `verify` read it from the path that was named as CHECKPOINT and nowhere else.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from torch import Tensor

from megatron_distill.cli.ranks import is_first
from megatron_distill.errors import CheckpointError, ConfigError, DistillError, ModelError
from megatron_distill.models import checkpoint
from megatron_distill.models.hf.io import SafetensorsFolder, copy_beside, save_folder
from megatron_distill.models.hf.stage import check_names
from megatron_distill.models.network import Network
from megatron_distill.models.spec import ModelSpec
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import Runtime, start
from megatron_distill.types import MicroBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE_TOKENS = 64
"""Length of each of the two random sequences that `verify` compares on."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code: 0 done, 1 `verify` found a difference, 2 something to put right."""
    try:
        chosen = _parser().parse_args(argv)
        return chosen.run(chosen)
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def to_megatron(chosen: argparse.Namespace) -> int:
    """Write `OUT/model` in the format of training checkpoints, and `OUT/hf` with config.json and tokenizer files."""
    source, out = chosen.hf_folder, chosen.out
    spec = ModelSpec.from_folder(source)
    check_names(spec, SafetensorsFolder(source))
    _refuse_existing(out, chosen.overwrite)
    with start(_sizes(chosen), _precision(spec)) as runtime:
        network = Network.load(source, runtime)
        partial = out.with_name(out.name + ".partial")
        if runtime.mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "model").mkdir(parents=True)
            (partial / "hf").mkdir()
            copy_beside(source, partial / "hf", runtime.precision.torch_dtype)
        runtime.mesh.barrier()
        checkpoint.save_weights(partial, network)
        if runtime.mesh.rank == 0:
            checkpoint.finish(partial, out, {"step": 0, "spec": asdict(spec)})
        runtime.mesh.barrier()
    _say(f"{out}: {_described(spec)}")
    return 0


def to_hf(chosen: argparse.Namespace) -> int:
    """Write a model folder that transformers and SGLang load."""
    source = chosen.model or _model_folder(chosen.checkpoint)
    spec = ModelSpec.from_folder(source)
    checkpoint.check_model(chosen.checkpoint, spec)
    _refuse_existing(chosen.out, chosen.overwrite)
    with start(_sizes(chosen), Precision()) as runtime:
        with checkpoint.reading(chosen.checkpoint):
            saved = _saved_dtype(chosen.checkpoint)
        if saved == torch.bfloat16:
            runtime = replace(runtime, precision=Precision(dtype="bf16"))
        network = Network.empty(spec, runtime)
        checkpoint.load_weights(chosen.checkpoint, network)
        if runtime.mesh.rank == 0:
            save_folder(
                chosen.out,
                spec,
                network.weights(),
                source=source,
                dtype=DTYPES.get(chosen.dtype, saved),
                max_shard_bytes=int(chosen.max_shard_gb * 10**9),
                overwrite=chosen.overwrite,
            )
        else:
            for _ in network.weights():  # every rank takes part in every gather
                pass
        runtime.mesh.barrier()
    _say(f"{chosen.out}: {_described(spec)}")
    return 0


def verify(chosen: argparse.Namespace) -> int:
    """Print the largest difference of any logit against transformers, both in fp32."""
    folder = chosen.hf_folder
    spec = ModelSpec.from_folder(folder)
    check_names(spec, SafetensorsFolder(folder))
    with start(ParallelSizes(), Precision()) as runtime:
        if chosen.checkpoint is None:
            network = Network.load(folder, runtime)
        else:
            network = Network.empty(spec, runtime)
            checkpoint.load_weights(chosen.checkpoint, network)
        length = min(PROBE_TOKENS, spec.max_positions)
        generator = torch.Generator().manual_seed(0)
        probes = [torch.randint(spec.vocab_size, (length,), generator=generator) for _ in range(2)]
        ours = _our_logits(network, probes)
        theirs = _logits_of_transformers(folder, probes, runtime)
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    largest = max(logits.abs().max().item() for logits in theirs)
    same = difference <= chosen.tolerance
    sign = "<=" if same else ">"
    print(f"largest logit difference {difference:.2e} {sign} {chosen.tolerance:.0e} (largest logit {largest:.2f})")
    return 0 if same else 1


def _our_logits(network: Network, probes: Sequence[Tensor]) -> list[Tensor]:
    def logits(hidden_RH: Tensor, _: int) -> Tensor:
        return (hidden_RH @ network.head().detach().t())[:, : network.spec.vocab_size]

    return network.read([_probe(tokens_T) for tokens_T in probes], logits)


def _probe(tokens_T: Tensor) -> MicroBatch:
    """One sequence of which every row is asked for."""
    rows, nothing_T, nothing_S = torch.arange(len(tokens_T)), torch.zeros_like(tokens_T), torch.zeros(1)
    return MicroBatch(
        input_T=tokens_T,
        position_T=rows,
        cu_seqlens=torch.tensor([0, len(tokens_T)], dtype=torch.int32),
        response_R=rows,
        target_R=nothing_T,
        segment_R=nothing_T,
        origin_R=nothing_T,
        rollout_logp_R=nothing_T,
        version_R=nothing_T,
        reward_S=nothing_S,
        group_S=nothing_S,
        index_S=nothing_S,
        sequences=(),
    )


@torch.no_grad()
def _logits_of_transformers(folder: Path, probes: Sequence[Tensor], runtime: Runtime) -> list[Tensor]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = model.to(runtime.backend.device)
    return [model(tokens_T[None].to(runtime.backend.device)).logits[0] for tokens_T in probes]


def _parser() -> Parser:
    parser = Parser(prog="python -m tools.convert", description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    forth = _verb(verbs, "to-megatron", "Hugging Face folder to Megatron checkpoint", to_megatron)
    forth.add_argument("hf_folder", type=Path, metavar="HF_FOLDER")
    _add_out(forth)

    back = _verb(verbs, "to-hf", "Megatron checkpoint to Hugging Face folder", to_hf)
    _add_checkpoint(back)
    _add_out(back)
    back.add_argument("--model", type=Path, help="folder to take config.json and tokenizer from; default: found itself")
    back.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as in the checkpoint")
    back.add_argument("--max-shard-gb", type=float, default=5.0, help="largest file, in 10^9 bytes (default 5)")

    proof = _verb(verbs, "verify", "largest logit difference against transformers", verify)
    proof.add_argument("hf_folder", type=Path, metavar="HF_FOLDER")
    _add_checkpoint(proof, nargs="?")
    proof.add_argument("--tolerance", type=float, default=1e-4, help="largest difference accepted (default 1e-4)")
    return parser


def _verb(verbs: Any, name: str, description: str, run: Any) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=description, description=description)
    parser.set_defaults(run=run)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser, **settings: Any) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="folder with model/ in it; may run code when read, so one you trust",
        **settings,
    )


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    for axis, meaning in (("tp", "tensor"), ("pp", "pipeline")):
        parser.add_argument(
            f"--{axis}", type=int, default=1, help=f"{meaning}-parallel processes that torchrun started (default 1)"
        )


def _sizes(chosen: argparse.Namespace) -> ParallelSizes:
    try:
        return ParallelSizes(tp=chosen.tp, pp=chosen.pp)
    except ValueError as error:
        raise ConfigError(f"--tp, --pp: {error}") from error


def _precision(spec: ModelSpec) -> Precision:
    """The type that holds the folder's weights exactly; fp16 fits into fp32."""
    return Precision(dtype="bf16" if spec.torch_dtype == "bfloat16" else "fp32")


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite and (out.is_file() or any(out.iterdir())):
        raise ModelError(f"{out}: is there already and not empty; name another folder, or add --overwrite")


def _model_folder(folder: Path) -> Path:
    """Where a checkpoint's config.json and tokenizer are: beside it, or what its run trained."""
    if (folder / "hf").is_dir():
        return folder / "hf"
    run = folder.parent.parent / "config.yaml"
    if run.is_file():
        return Path(yaml.safe_load(run.read_text(encoding="utf-8"))["student"]["model"])
    raise CheckpointError(f"{folder}: neither hf/ in it nor a run's config.yaml two folders up; add --model HF_FOLDER")


def _saved_dtype(folder: Path) -> torch.dtype:
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_tensors_metadata(str(folder / "model"))
    return next(tensor.dtype for name, tensor in tensors.items() if name.endswith("word_embeddings.weight"))


def _described(spec: ModelSpec) -> str:
    return f"{spec.family}, {spec.num_layers} layers, hidden size {spec.hidden_size}"


def _say(line: str) -> None:
    if is_first():
        print(line)


if __name__ == "__main__":
    sys.exit(main())
