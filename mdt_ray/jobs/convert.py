"""Job `convert`: weights of another origin into a checkpoint of ours, or a checkpoint into another layout. Needs no Ray."""

import logging

from mdt_ray import run_folder, storage
from mdt_ray.config import ConvertConfig
from mdt_ray.inference import convert as files
from mdt_ray.models import official

logger = logging.getLogger(__name__)


def convert(config: ConvertConfig) -> str:
    """Convert config.source; returns the output's URI.

    Raises ValueError for weights of no known layout, tensors too many, too few or of another shape, a layout that cannot
    hold the model, and an output that exists already.
    """
    if config.to == "mdt_ray":
        return _import(config)
    if storage.exists(config.output):
        raise ValueError(f"output = {config.output!r}: exists; name another, or delete it")
    files.export_weights(config.source, config.to, config.output, config.weights)
    return config.output


def _import(config: ConvertConfig) -> str:
    weights = files.read_weights(config.source)
    run = run_folder.describe("convert", config, {"source": weights.sha256})
    if files.is_published(config.output, run):
        return config.output
    asked = {"num_heads": config.num_heads, "decode_layer": config.decode_layer, "input_size": config.input_size,
             "class_dropout_prob": config.class_dropout_prob}
    arguments = official.infer_config(weights.tensors, **weights.known | {k: v for k, v in asked.items() if v is not None})
    logger.info("layout %s: %s", official.layout_of(weights.tensors),
                ", ".join(f"{name} {value}" for name, value in sorted(arguments.items())))
    converted = official.convert(weights.tensors, arguments)
    logger.info("  taken for granted (name others where they differ): --vae.path %s, --license %s", config.vae.path,
                config.license)
    for note in converted.notes:
        logger.info("  %s", note)
    files.write_checkpoint(converted, config.output, source=config.source, sha256=weights.sha256, run=run,
                           vae={"path": config.vae.path, "revision": config.vae.revision},
                           image_size=config.image_size, license=config.license)
    return config.output
