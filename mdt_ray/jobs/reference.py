"""Job `reference`: real images -> reference statistics for `evaluate`, in the layout of ADM's published files.

    run.json         settings, identity
    chunks/          features of the images, deleted at the end
    reference.npz    arr_0, mu, sigma, mu_s, sigma_s, and facts that say what they are of; written last
"""

import dataclasses

import numpy as np

from mdt_ray import run_folder, storage
from mdt_ray.config import ReferenceConfig
from mdt_ray.data import picture_sets
from mdt_ray.evaluation import chunks, extractors, gate, results
from mdt_ray.evaluation.reference import write_reference
from mdt_ray.jobs.evaluate import REFERENCE
from mdt_ray.jobs.measuring import Measurement, absolute_weights, measure_missing, place


def reference(config: ReferenceConfig, pool: bool = True) -> str:
    """Measure every image of config.source; returns the URI of the statistics. Does nothing where they are.

    Args:
        pool: False works in this process, without Ray.
    Raises ValueError for a source or weights that are not there, images of another size, and images that give no statistics.
    """
    config = dataclasses.replace(config, source=place(config.source), output=storage.absolute(config.output),
                                 extractor_weights=absolute_weights(config.extractor_weights))
    weights_hash = extractors.weights_hash(config.extractor, config.extractor_weights)
    chunks.check_extractor(config.extractor, config.image_size)
    measured = _measurement(config)
    run = run_folder.describe("reference", config, {"images": measured.fingerprint(weights_hash)})
    run_folder.check_identity(config.output, run)
    target = storage.join(config.output, REFERENCE)
    if storage.exists(target):
        storage.remove(storage.join(config.output, "chunks"))  # a run that was killed at its very end leaves them
        return target
    with run_folder.claim(config.output, run):
        measure_missing([measured], config.workers, pool, "reference")
        summary = results.summarise((chunks.read_chunk(uri) for uri in measured.items()), chosen=np.empty(0, dtype=np.int64))
        wrong = gate.reasons(summary.facts, num_expected=summary.num_images, num_rejected=summary.num_rejected)
        if wrong:
            raise ValueError(f"{config.source}: these images give no statistics:\n  " + "\n  ".join(wrong))
        facts = {"extractor": config.extractor, "weights_hash": weights_hash,
                 "transform": extractors.transform(config.extractor), "image_size": config.image_size,
                 "num_images": summary.num_images, "source": config.source}
        pictures = (chunks.read_chunk(uri).images for uri in measured.items())
        write_reference(target, dataclasses.replace(summary.statistics, facts=facts), pictures,
                        (summary.num_kept, config.image_size, config.image_size, 3))
        storage.remove(storage.join(config.output, "chunks"))
    return target


def _measurement(config: ReferenceConfig) -> Measurement:
    pictures = picture_sets.open_pictures(config.source)
    if pictures.image_size not in (None, config.image_size):
        raise ValueError(f"image_size = {config.image_size}: {config.source} has pictures of {pictures.image_size} pixels; "
                         f"use --image-size {pictures.image_size}")
    return Measurement(pictures=pictures, folder=config.output, image_size=config.image_size, exact=False,
                       extractor=config.extractor, extractor_weights=config.extractor_weights, chunk_size=config.chunk_size,
                       num_images=pictures.num_images, num_kept=config.num_images, spread=True)
