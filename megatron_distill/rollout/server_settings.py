"""What an SGLang server is started with: settings, interpreter, key, command, environment, ports. Nothing runs here."""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import socket
import stat
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from megatron_distill.errors import EngineError
from megatron_distill.runtime.processes import cores, visible_gpus

type Device = Literal["cpu", "cuda"]

CPU_TOTAL_TOKENS = 16384
"""Of a server on a CPU, unless the settings say otherwise: left to itself it takes most of the machine's memory."""
CHECKOUT = Path(__file__).parents[2]

KEPT = 2
"""Positions of its context that a server fills with no prompt and no response: it cuts what would need them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """SGLang servers that are started on this machine."""

    count: int = 1
    """How many."""
    python: Path | None = None
    """Interpreter of an environment that holds SGLang; none: the one that `make sglang` has made, or else this one."""
    host: str = "127.0.0.1"
    """The address that servers listen on. Another than loopback needs `api_key_file`."""
    port: int = 0
    """Of the first server, the others take the ones that follow; 0: any that are free."""
    api_key_file: Path | None = None
    """File with the key that requests must carry. Only its owner may be able to read it."""
    tp: int = 1
    """Tensor-parallel size of each server."""
    devices: tuple[str, ...] = ()
    """GPUs of all servers together, named as in CUDA_VISIBLE_DEVICES; none: those that this process sees. Each server
    takes `tp` of them in turn."""
    context_length: int | None = None
    """Positions for a prompt and its response; none: the model's. A server keeps some to itself: both together may take
    all but 2, a prompt all but 7."""
    max_total_tokens: int | None = None
    """Tokens that fit into the key-value cache; none: 16384 on a CPU, all that fit on a GPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and arithmetic; `auto`: float32 on a CPU, bfloat16 on a GPU."""
    arguments: tuple[str, ...] = ()
    """Further arguments for SGLang, as its command line takes them."""
    start_seconds: float = 600.0
    """How long a start may take, until the server answers."""

    def __post_init__(self) -> None:
        for name in ("count", "tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.port <= 65536 - self.count:
            raise ValueError(f"port={self.port}: must be 0, or leave room for count={self.count} below 65536")
        if self.start_seconds <= 0:
            raise ValueError(f"start_seconds={self.start_seconds}: must be above 0")
        if self.api_key_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host={self.host}: a server that others can reach needs a key: name a file with one in "
                "api_key_file, or leave host at 127.0.0.1"
            )
        if any(argument.partition("=")[0] in ("--api-key", "--admin-api-key") for argument in self.arguments):
            raise ValueError("arguments: a key on a command line can be read by everybody; use api_key_file")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_api_key(file: Path | None) -> str | None:
    """The key in a file, if one is named.

    Raises:
        EngineError: it cannot be read, others than its owner may read it, or what it holds is not a key.
    """
    if file is None:
        return None
    try:
        mode, key = file.stat().st_mode, file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"api_key_file={file}: cannot be read ({error})") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise EngineError(f"api_key_file={file}: others than its owner may read it; chmod 600 {file}")
    if not key.isascii() or not key.isprintable() or " " in key or not key or key.startswith("-"):
        raise EngineError(
            f"api_key_file={file}: must hold one key: printable ASCII characters without spaces, not beginning with -; "
            f"write one with: (umask 077; openssl rand -hex 32 > {file})"
        )
    return key


def server_python(setting: Path | None = None) -> Path:
    """The interpreter that servers run with.

    Raises:
        EngineError: it is not there, or there is none with SGLang.
    """
    if setting is not None:
        if not os.access(setting, os.X_OK):
            raise EngineError(f"servers.python={setting}: not an interpreter that can be run")
        # not resolved: the link in a virtual environment's folder is what makes it that environment's
        return setting.absolute()
    if os.access(made := CHECKOUT / ".venv-sglang" / "bin" / "python", os.X_OK):
        return made
    if importlib.util.find_spec("sglang") is not None:
        return Path(sys.executable)
    raise EngineError(
        "no environment with SGLang: `make sglang` makes one in .venv-sglang (10 GB), or name an interpreter that has "
        "sglang 0.5.23 in servers.python"
    )


def server_command(settings: ServerSettings, model: Path, device: Device, port: int, seed: int) -> list[str]:
    """What starts one server, without its key.

    Raises:
        EngineError: there is no interpreter with SGLang.
    """
    dtype = {"cpu": "float32", "cuda": "bfloat16"}[device] if settings.dtype == "auto" else settings.dtype
    flags: dict[str, object] = {
        "--model-path": model,
        "--host": settings.host,
        "--port": port,
        "--dtype": dtype,
        "--tp-size": settings.tp,
        "--random-seed": seed,
        "--context-length": settings.context_length,
        "--max-total-tokens": settings.max_total_tokens,
        # the text of ids is ours to make, with the student's own tokenizer
        "--skip-tokenizer-init": "",
        "--skip-server-warmup": "",
        # without work a scheduler would keep a core busy, which trainers on this machine need
        "--sleep-on-idle": "",
        "--log-level-http": "warning",
    }
    if settings.api_key_file is not None:
        # at a lower level a server writes its settings into its log, the key with them
        flags["--log-level"] = "warning"
    if device == "cpu":
        flags["--device"] = "cpu"
        flags["--attention-backend"] = "torch_native"
        flags["--disable-overlap-schedule"] = ""
        flags["--max-total-tokens"] = settings.max_total_tokens or CPU_TOTAL_TOKENS
    words = [str(word) for flag, value in flags.items() if value is not None for word in (flag, value) if word != ""]
    return [str(server_python(settings.python)), "-m", "sglang.launch_server", *words, *settings.arguments]


def server_environment(settings: ServerSettings, device: Device, index: int) -> dict[str, str]:
    """Variables of the server of this index, beside those of this process.

    Raises:
        EngineError: there are fewer GPUs than the servers need.
    """
    # a look at a server must not cost it a token, nor fail while it is paused
    changes = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
    if is_loopback(settings.host):
        # the group over which weights arrive
        changes |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if device == "cpu":
        changes |= {"SGLANG_PLATFORM": "torch_cpu", "CUDA_VISIBLE_DEVICES": ""}
        # memory that was freed is kept: new weights arrive in new tensors each time, and fetching their pages from the
        # system takes longer than sending what goes into them
        changes |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        if settings.tp > 1:
            changes["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(_shares(cores(), settings.tp))
        return changes
    gpus = settings.devices or tuple(visible_gpus())
    needed = settings.count * settings.tp
    if len(gpus) < needed:
        raise EngineError(
            f"servers: count={settings.count} with tp={settings.tp} need {needed} GPUs, there are {len(gpus)} "
            f"({', '.join(gpus) or 'none'}): ask for fewer, or name others in servers.devices"
        )
    return changes | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * settings.tp : (index + 1) * settings.tp])}


def _shares(numbers: Sequence[int], count: int) -> list[str]:
    """Even shares of cores; where there are too few, ranks have the same ones."""
    if len(numbers) < count:
        return [str(core) for core in itertools.islice(itertools.cycle(numbers), count)]
    size = len(numbers) // count
    return [",".join(map(str, numbers[i * size : (i + 1) * size])) for i in range(count)]


def choose_ports(host: str, first: int, count: int) -> list[int]:
    """Ports that are free now: `count` from `first` on, or any where `first` is 0.

    Raises:
        EngineError: one that was asked for is taken.
    """
    with ExitStack() as held:
        if first:
            for port in range(first, first + count):
                held.enter_context(bound(host, port))
            return list(range(first, first + count))
        found: list[int] = []
        # Below those that the system gives to outgoing connections: a server that is started anew must get its
        # address back, and until then nobody may have been given it by chance. And above 22000 to 29999, from which
        # SGLang chooses its own.
        for port in random.sample(range(30000, _first_of_outgoing()), k=500):
            with suppress(EngineError):
                held.enter_context(bound(host, port))
                found.append(port)
            if len(found) == count:
                return found
    raise EngineError(f"{host}: {count} free ports were not found; is it an address of this machine?")


def _first_of_outgoing() -> int:
    with suppress(OSError, ValueError):
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
        if first >= 30500:
            return first
    return 32768


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens, so that nobody else can until it is closed.

    Raises:
        EngineError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    # as the server will: a connection that has ended lately does not count
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
        taken.listen(1)
    except OSError as error:
        taken.close()
        raise EngineError(
            f"{host}:{port}: a server cannot listen there ({error.strerror}); choose another servers.port or host, or "
            "port 0 for any that is free"
        ) from None
    return taken
