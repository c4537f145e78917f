"""Start the ranks of a run on this machine, and say in one line what became of them.

The same elastic agent as `torchrun` starts them, in this process: its long report goes to a log, and what a person
reads is the last word of the rank that failed first. Under somebody else's `torchrun`, which `srun` may have started on
every node, nothing is started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_distill.errors import ConfigError, DistillError


def launched() -> bool:
    """Whether a launcher started this process as one of its ranks.

    Raises:
        ConfigError: `srun` started several of this process, which then do not know of each other.
    """
    if "RANK" in os.environ:
        return True
    # of the step and not of the job: a batch script that asked for several tasks is still one process
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        raise ConfigError(
            f"srun started {tasks} of this command, and none knows its rank: start torchrun with it, one on each node, "
            "as in srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES --nproc-per-node=N "
            "--rdzv-backend=c10d --rdzv-endpoint=HOST:PORT -m megatron_distill.cli train CONFIG"
        )
    return False


def is_first() -> bool:
    """Whether this is the rank that speaks for all; true without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def become_worker(folder: Path) -> None:
    """In a rank: warnings and tracebacks go to its log; only the first rank keeps the screen."""
    log = log_of(folder, int(os.environ["RANK"]))
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, sys.stderr.fileno())
    if not is_first():
        os.dup2(file, sys.stdout.fileno())
    os.close(file)


def log_of(folder: Path, rank: int) -> Path:
    """Where a rank of the run in `folder` writes what is not for the screen."""
    return folder / "logs" / f"rank_{rank:04d}.log"


def start(words: Sequence[str], world: int, folder: Path, module: str = "megatron_distill.cli") -> int:
    """`megatron-distill *words` on `world` ranks of this machine, whose logs lie in `folder`; their exit code.

    Raises:
        DistillError: what the first rank to fail said, where a person can put it right.
        KeyboardInterrupt: Ctrl-C, after all ranks have ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world)))
    written = {rank: _size(log_of(folder, rank)) for rank in range(world)}
    with tempfile.TemporaryDirectory() as scratch, _logging_to(folder / "logs" / "launcher.log"):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *words, "--worker", folder)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _report(rank, failure.exitcode, log_of(folder, rank), written[rank])
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            print(f"stopped by {error.sigval.name}", file=sys.stderr)
            return 128 + error.sigval
    return 0


def _report(rank: int, code: int, log: Path, begin: int) -> int:
    """Say why a rank ended; an error that a person can put right reads as if there were no ranks."""
    lines = _tail(log, begin)
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if code == 2 and told:
        raise DistillError("\n".join(told))
    if code < 0:
        name = signal.Signals(-code).name
        why = f"was killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")
    else:
        why = f"failed: {lines[-1] if lines else f'exit code {code}'}"
    print(f"error: rank {rank} {why}; its log: {log}", file=sys.stderr)
    return 128 - code if code < 0 else code


def _tail(log: Path, begin: int) -> list[str]:
    """The lines that this start added to a log, without empty ones."""
    if not log.is_file():
        return []
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(begin)
        return [line.rstrip() for line in file if line.strip()]


def _size(log: Path) -> int:
    return log.stat().st_size if log.is_file() else 0


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """The agent's own log lines go to a file; torch gives some of its loggers a handler for the screen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    agent = logging.getLogger("torch.distributed")
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(f"{agent.name}."):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
    agent.propagate = False
    agent.handlers[:] = [logging.FileHandler(path)]
    try:
        yield
    finally:
        agent.handlers.pop().close()
