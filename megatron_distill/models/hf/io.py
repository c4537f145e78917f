"""Model folders of safetensors: read one tensor at a time, written without ever holding a shard in memory.

Only safetensors: `.bin` and `.pt` files are pickles, which may run code, and are refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_distill.errors import ModelError
from megatron_distill.models.hf.mapping import rules
from megatron_distill.models.spec import ModelSpec, read_config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

BESIDE_WEIGHTS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What is copied along with weights besides config.json: data only, never Python."""

_CODES: Mapping[torch.dtype, str] = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class SafetensorsFolder:
    """Tensors of a Hugging Face model folder by name; nothing stays open or in memory between calls."""

    def __init__(self, path: str | Path) -> None:
        """List the names.

        Raises:
            ModelError: no folder, no safetensors in it, or an index that names a missing file.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise ModelError(f"{self.path}: no such folder; give the path of a Hugging Face model folder")
        self._file_of: Mapping[str, Path] = _index(self.path)

    @property
    def names(self) -> frozenset[str]:
        """Every tensor in the folder."""
        return frozenset(self._file_of)

    def file(self, name: str) -> Path:
        """The file that holds `name`.

        Raises:
            ModelError: no such tensor in the folder.
        """
        if name not in self._file_of:
            raise ModelError(
                f"{self.path}: tensor {name} is missing; the download is incomplete or config.json is wrong"
            )
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        file = self.file(name)
        try:
            with safe_open(file, framework="pt") as opened:
                return tuple(opened.get_slice(name).get_shape())
        except SafetensorError as error:
            raise _unreadable(file, error) from error

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """`name`, or its entries `start .. stop` along `dim`; only those are read from disk."""
        file = self.file(name)
        try:
            with safe_open(file, framework="pt") as opened:
                if stop is None:
                    return opened.get_tensor(name)
                return opened.get_slice(name)[(slice(None),) * dim + (slice(start, stop),)]
        except SafetensorError as error:
            raise _unreadable(file, error) from error


def _index(folder: Path) -> dict[str, Path]:
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: folder / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not a safetensors index ({error!r}); download the file again") from error
        for file in sorted(set(files.values())):
            if file.parent != folder or not file.is_file():
                raise ModelError(f"{index}: names {file.name}, which is not in the folder; complete the download")
        return files
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single)
        except SafetensorError as error:
            raise _unreadable(single, error) from error
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    found = f"only {', '.join(pickles[:3])}: pickled weights may run code and are refused" if pickles else "no weights"
    raise ModelError(f"{folder}: {found}; a model folder must hold {SINGLE} or {INDEX}")


def _unreadable(file: Path, error: SafetensorError) -> ModelError:
    return ModelError(f"{file}: not a readable safetensors file ({error}); download the file again")


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan(spec: ModelSpec, dtype: torch.dtype) -> list[TensorPlan]:
    """What an export of this model writes, in the order of `mapping.export`."""
    return [
        TensorPlan(name, shape, dtype)
        for rule in rules(spec)
        if rule.exported
        for name, shape in zip(rule.hf, rule.shapes, strict=True)
    ]


class TensorFile:
    """One safetensors file, written without holding anything: its header first, each tensor's bytes as they come."""

    def __init__(self, path: Path, planned: Sequence[TensorPlan]) -> None:
        """Make the file; `planned` are its tensors in the order of `write`."""
        self._left = list(planned)[::-1]
        self._file: BinaryIO = path.open("wb")
        self._file.write(_header(planned))

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; anything but the next planned one is a mistake of the caller."""
        due = self._left.pop()
        assert (name, tuple(tensor.shape), tensor.dtype) == (due.name, due.shape, due.dtype), (name, due)
        self._file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Flushed to disk: only then is it certain that there was room."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


class ShardWriter:
    """Writes planned tensors, in planned order, into a folder that appears only when all are there.

    Knowing names, shapes and types beforehand lets it write a file's header first and each tensor's bytes as they
    come, so it holds nothing. Use as a context manager; on an error the unfinished `<folder>.partial` stays behind
    and the next attempt replaces it.
    """

    def __init__(
        self,
        folder: str | Path,
        planned: Sequence[TensorPlan],
        max_shard_bytes: int = 5 * 10**9,
        overwrite: bool = False,
    ) -> None:
        """Prepare to write.

        Args:
            folder: where the model goes.
            planned: every tensor, in the order of `write`.
            max_shard_bytes: of one file; a larger single tensor gets a file of its own.
            overwrite: replace a folder that is there.

        Raises:
            ModelError: the folder is there and not empty.
        """
        self.folder = Path(folder)
        if self.folder.exists() and not overwrite and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ModelError(
                f"{self.folder}: is there already and not empty; name another folder, or allow overwriting"
            )
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self._shards = _cut_shards(planned, max_shard_bytes)
        self._left = [(shard, tensor) for shard, tensors in enumerate(self._shards) for tensor in tensors][::-1]
        self._file: TensorFile | None = None

    def __enter__(self) -> ShardWriter:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            self._finish()

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; anything but the next planned one is a mistake of the caller."""
        shard, due = self._left.pop()
        if due is self._shards[shard][0]:
            if self._file is not None:
                self._file.close()
            self._file = TensorFile(self.partial / self._file_name(shard), self._shards[shard])
        assert self._file is not None
        self._file.write(name, tensor)

    def _file_name(self, shard: int) -> str:
        return file_name(shard, len(self._shards))

    def _finish(self) -> None:
        assert not self._left, f"not written: {self._left[-1][1].name}"
        write_index(self.partial, self._shards)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.partial.rename(self.folder)


def file_name(shard: int, shards: int) -> str:
    """Of one of several files of a model folder, counted from 0, or of the only one."""
    return SINGLE if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"


def write_index(folder: Path, shards: Sequence[Sequence[TensorPlan]]) -> None:
    """Say which tensor is in which file; a single file needs no index."""
    if len(shards) > 1:
        where = {tensor.name: file_name(n, len(shards)) for n, shard in enumerate(shards) for tensor in shard}
        total = sum(tensor.bytes for shard in shards for tensor in shard)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def save_folder(
    folder: str | Path,
    spec: ModelSpec,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str | Path,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write a whole model folder that transformers and SGLang load.

    Args:
        folder: where it goes.
        spec: the architecture.
        tensors: the stream of `mapping.export`; each is converted to `dtype`.
        source: the model folder whose config.json and tokenizer files go with it.
        dtype: of the weights in the folder.
        max_shard_bytes: as for `ShardWriter`.
        overwrite: as for `ShardWriter`.
    """
    with ShardWriter(folder, plan(spec, dtype), max_shard_bytes, overwrite) as writer:
        copy_beside(source, writer.partial, dtype)
        for name, tensor in tensors:
            writer.write(name, tensor.to(dtype))


def copy_beside(source: str | Path, destination: Path, dtype: torch.dtype) -> None:
    """Put a model folder's config.json, saying that weights are of `dtype`, and its tokenizer files elsewhere."""
    config = read_config(source)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    _write_json(destination / "config.json", config)
    for name in BESIDE_WEIGHTS:
        if (file := Path(source) / name).is_file():
            shutil.copyfile(file, destination / name)


def _cut_shards(planned: Sequence[TensorPlan], max_bytes: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in planned:
        if shards[-1] and filled + tensor.bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    return shards


def _header(tensors: Sequence[TensorPlan]) -> bytes:
    """A safetensors file up to its data: 8 bytes of length, then JSON padded so that data are aligned to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + tensor.bytes
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
