"""Every exception that a user can meet; each refines the built-in error it is a kind of.

An error meant for a person says four things: where, what was given, what is allowed, what to do. The command
line prints it as one line and exits with code 2; nothing below the command line catches it.
"""


class DistillError(Exception):
    """Anything the user can put right; its text is complete without a traceback."""


class ConfigError(DistillError, ValueError):
    """A setting, or a combination of settings, that cannot run."""


class DataError(DistillError, ValueError):
    """A data file, a tokenizer or a chat template that cannot be used as it is."""


class ModelError(DistillError, ValueError):
    """A model folder that is missing, incomplete, of an unknown family, or not what its config says."""


class CheckpointError(DistillError, RuntimeError):
    """A checkpoint that is incomplete, belongs to another model or run, or cannot be written."""


class EngineError(DistillError, RuntimeError):
    """A rollout engine that gave no usable answer."""


class EngineStopped(EngineError):
    """The engine of a run cannot go on; raised on all ranks together, so that they can save a checkpoint first."""


class ServerError(EngineError):
    """Something between this process and one server.

    `server` is its address, `request` the id of what it was asked, empty if it was nothing in particular. Instances
    can be pickled, so that every rank can raise what one of them met.
    """

    def __init__(self, message: str, *, server: str = "", request: str = "") -> None:
        super().__init__(message)
        self.server = server
        self.request = request


class ServerLost(ServerError):
    """A server that does not listen, hung up, cut its answer short or no longer reacts: dead, or about to be.

    The same may be asked again, of another server or of this one once it runs again.
    """


class ServerFailed(ServerError):
    """A server that runs and says itself that something went wrong there (5xx); it may be asked again, a few times."""


class RequestRefused(ServerError):
    """A request that no server will ever take: refused by one (4xx, in `status`), or here, before it was sent."""

    def __init__(self, message: str, *, server: str = "", request: str = "", status: int | None = None) -> None:
        super().__init__(message, server=server, request=request)
        self.status = status


class RequestTimedOut(ServerError):
    """A request that was not answered in time and was aborted, by a server that still reacts."""


class BadAnswer(ServerError):
    """An answer that is not what the server's version of SGLang is known to give."""


class WrongWeights(ServerError):
    """An answer by weights that this run did not announce; it must not be used."""


class SyncError(EngineError):
    """New weights that did not reach every server; `servers` are the addresses that were lost or silent, if any."""

    def __init__(self, message: str, *, servers: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.servers = servers


class RewardError(DistillError, RuntimeError):
    """A verifier that could not be started, or keeps dying."""
