"""One run as one checked object: `load` a file, `check` what fits together, `dump` it so that it loads again.

Importing this imports torch, and neither Megatron nor an engine: a config is checked where there is no GPU.
"""

from megatron_distill.config.reference import reference, schema
from megatron_distill.config.rules import check, mesh_folders, model_folders
from megatron_distill.config.run import RunConfig, dump, load, save, tree
from megatron_distill.config.sections import MetricsSection, PathsSection, TrainSection

__all__ = [
    "MetricsSection",
    "PathsSection",
    "RunConfig",
    "TrainSection",
    "check",
    "dump",
    "load",
    "mesh_folders",
    "model_folders",
    "reference",
    "save",
    "schema",
    "tree",
]
