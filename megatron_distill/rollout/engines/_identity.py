"""Whether a server serves the model that the run trains: what it says of itself against the student's folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_distill.errors import EngineError, ModelError
from megatron_distill.models.spec import ModelLimits, ModelSpec, read_config
from megatron_distill.rollout.sglang import Client, ServerInfo


async def check_server(client: Client, folder: Path, valid_vocab: int | None) -> None:
    """See that a server was started with a model of the student's architecture; its weights do not matter yet.

    Args:
        client: of the server.
        folder: the student's.
        valid_vocab: ids that the run uses.

    Raises:
        EngineError: it serves another model.
    """
    info = await client.info()
    if wrong := difference(info, folder, valid_vocab):
        raise EngineError(f"{client.url}: {wrong}; start the server with student.model={folder}, or name another one")


def difference(info: ServerInfo, folder: Path, valid_vocab: int | None) -> str | None:
    """In what the served model differs from that of `folder`, in words; None: nothing that can be told from outside.

    The rest shows when weights are pushed: a tensor of another shape is refused, and the canary compares log-probs.
    """
    told, wanted = info.settings.get("architectures"), read_config(folder).get("architectures")
    served = f"serves {info.model_path}"
    if told and wanted and list(told) != list(wanted):
        return f"{served}, a {told[0]}, but the student is a {wanted[0]}"
    limits = ModelLimits.from_folder(folder)
    if info.vocab_size != limits.vocab_size:
        return f"{served}, whose vocabulary has {info.vocab_size} ids, but the student's has {limits.vocab_size}"
    if valid_vocab is not None and valid_vocab > info.vocab_size:
        return f"{served}, whose vocabulary has {info.vocab_size} ids, but the run uses {valid_vocab}"
    there = Path(info.model_path)
    return _config_difference(served, there, folder) if (there / "config.json").is_file() else None


def _config_difference(served: str, there: Path, here: Path) -> str | None:
    """The first number that differs; how weights began and lie on disk does not matter."""
    try:
        told, wanted = ModelSpec.from_folder(there), ModelSpec.from_folder(here)
    except ModelError as error:
        return f"{served}: {error}"
    for field in dataclasses.fields(ModelSpec):
        found, needed = getattr(told, field.name), getattr(wanted, field.name)
        if found != needed and field.name not in ("torch_dtype", "initializer_range"):
            return f"{served} with {field.name}={found}, but the student has {needed}"
    return None
