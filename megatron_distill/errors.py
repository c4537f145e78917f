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
    """A checkpoint that is incomplete, or belongs to another model or run."""


class EngineError(DistillError, RuntimeError):
    """A rollout engine that gave no usable answer."""


class RewardError(DistillError, RuntimeError):
    """A verifier that could not be started, or keeps dying."""
