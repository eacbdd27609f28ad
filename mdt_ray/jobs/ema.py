"""Job `ema`: the power-function average of any length, at the step of any snapshot of a training run. Needs no Ray."""

import dataclasses
import logging

from mdt_ray import checkpoints, config_io, run_folder, storage
from mdt_ray.config import ReconstructConfig
from mdt_ray.inference import convert
from mdt_ray.training import posthoc, snapshots
from mdt_ray.training.ema import gamma_of

logger = logging.getLogger(__name__)
MAX_ERROR = 0.01
"""Above this relative error of the fit the job warns. EDM2's two averages (0.05, 0.10) and 16 snapshots at equal distances
stay below it for lengths between 0.05 and 0.15."""


def ema(config: ReconstructConfig) -> str:
    """Reconstruct the average of config.sigma_rel; returns the last line to print. Does nothing where that is done.

    Raises ValueError without snapshots up to the step, for a damaged one, and for an output that holds another run.
    """
    source, output = storage.absolute(config.source), storage.absolute(config.output)
    uris = snapshots.list_until(source, config.step)
    config = dataclasses.replace(config, source=source, output=output,
                                 step=config.step or checkpoints.step_of(uris[-1]))
    stored = snapshots.read_stored(uris)
    wanted = posthoc.Profile(gamma_of(config.sigma_rel), config.step)
    fit = posthoc.fit([s.profile for s in stored], wanted)
    if fit.error > MAX_ERROR:
        logger.warning("the sum of what is stored differs from the wanted average by %.1f%%: more snapshots are needed "
                       "(--ema.snapshot-every-steps), or a length nearer to those stored (%s)",
                       100 * fit.error, ", ".join(f"{std:g}" for std in sorted({s.sigma_rel for s in stored})))
    run = run_folder.describe("ema", config, {"snapshots": _fingerprint(uris)}) | {"trained": _settings(source)}
    if not convert.is_published(output, run):
        logger.info("adding up %d averages of %d snapshots", len(stored), len(uris))
        facts = storage.read_json(storage.join(uris[-1], "state.json"))
        del facts["power_stds"]
        average = {"sigma_rel": config.sigma_rel, "gamma": wanted.gamma, "error": fit.error, "num_snapshots": len(uris)}
        convert.publish(snapshots.add_up(stored, fit.coefficients), output, run,
                        facts | {"step": config.step, "average": average})
    return (f"sigma_rel {config.sigma_rel:g} (gamma {wanted.gamma:.4g}) at step {config.step}, from {len(stored)} averages "
            f"in {len(uris)} snapshots; rms error of the fit {fit.error:.2%}\n{output}")


def _fingerprint(uris: list[str]) -> str:
    """Names the snapshots by their content."""
    return config_io.fingerprint([storage.sha256(storage.read_bytes(storage.join(uri, checkpoints.CHECKSUMS)))
                                  for uri in uris])


def _settings(source: str) -> dict:
    """The settings of the training run, for the model card; {} where only its snapshots are left."""
    uri = storage.join(source, "run.json")
    return storage.read_json(uri)["config"] if storage.exists(uri) else {}
