"""What the ranks of a training run and whoever starts them agree on. Loads no model: a driver has no use for one."""

from mdt_ray import checkpoints, config_io, storage
from mdt_ray.config import ModelConfig
from mdt_ray.data.latents import Manifest
from mdt_ray.training import samples

METRICS = "metrics.parquet"
STACKS = "stacks"
"""In a training output: where the threads of a rank were that made no progress."""
INIT_FROM = "init_from.txt"
"""In a training output: what was taken from the weights that it started from, and what is new."""


class TrainingDiverged(RuntimeError):
    """The gradients became non-finite again after every return to the same checkpoint."""


def resolve_model(config: ModelConfig, manifest: Manifest) -> ModelConfig:
    """`config` with what it leaves open taken from the latents. Raises ValueError where the two disagree."""
    found = {"input_size": manifest.shape[1], "in_channels": manifest.shape[0], "num_classes": manifest.num_classes}
    if manifest.shape[1] != manifest.shape[2]:
        raise ValueError(f"latents have shape {tuple(manifest.shape)}: must be square; crop when precomputing")
    for name, value in found.items():
        asked = getattr(config, name)
        if asked is None or asked == value or (name == "num_classes" and asked == 0):
            continue  # (0 classes: an unconditional model)
        if name == "num_classes" and asked > value:
            continue  # a small sample of a data set may lack its last classes
        raise ValueError(f"model.{name} = {asked}: the latents have {value}; "
                         "leave it out to take theirs, or precompute others")
    missing = {name: value for name, value in found.items() if getattr(config, name) is None}
    return config_io.override(config, missing, where="model")


def write_metrics(output: str, rows: list[dict]) -> None:
    """metrics.parquet beside the checkpoints: rows of metrics, with those of samples so far."""
    checkpoints.write_metrics(storage.join(output, METRICS), samples.with_columns(output, rows))
