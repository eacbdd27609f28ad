"""Job `tune`: points of a space, each trained and judged as trials of Ray Tune, then ranked.

The ledger is ours (tuning/trials.py), not Tune's pickled state: the same command again runs the trials that have no result,
from their newest checkpoints, and no other.
"""

import dataclasses
from typing import Any

from mdt_ray import run_folder, storage
from mdt_ray.config import TuneConfig, require
from mdt_ray.data import latents
from mdt_ray.data.latents import Manifest
from mdt_ray.evaluation import results
from mdt_ray.jobs import search, session
from mdt_ray.jobs.trial import resolve, resolve_trial
from mdt_ray.tuning import compare, trials
from mdt_ray.tuning.space import Space, load_space
from mdt_ray.tuning.trials import FAILED, FINISHED, STOPPED, Trial

RESULTS = "results.json"
DEFAULTS = {"search": "grid", "scheduler": "none", "cost": "none", "equal": "steps", "num_seeds": 1}


def tune(config: TuneConfig) -> dict[str, Any]:
    """Run the trials that have no result yet; returns the content of results.json.

    Raises ValueError for a bad space or setting before anything starts, and RuntimeError where trials did not end, or none
    finished.
    """
    config = dataclasses.replace(config, output=storage.absolute(config.output))
    require(bool(config.evaluate.reference), "evaluate.reference", "", "not given; name real images, or statistics of them")
    space = load_space(config.space)
    config = settled(config, space)
    manifest = latents.open_manifest(config.train.latents)
    run = run_folder.describe("tune", config, {"latents": manifest.content})
    run_folder.check_identity(config.output, run)
    _check(config, space, manifest)
    wanted = _listed(config, space) if config.search != "optuna" else _known(config)
    for t in wanted:
        if config.retry_failed and (t.result() or {}).get("status") == FAILED:
            storage.remove(t.folder)
    missing = sum(t.result() is None for t in wanted)
    if config.search == "optuna":
        missing += max(config.max_trials - len(wanted), 0)
    if missing:
        with run_folder.claim(config.output, run) as token:
            session.start(dashboard=True)
            session.require_room(config.train.workers)
            if config.search == "optuna":
                search.run_suggested(config, space, wanted, objective(config, space), token)
                wanted = _known(config)
            else:
                search.run_listed(config, wanted, token)
    return _written(config, space, wanted)


def _listed(config: TuneConfig, space: Space) -> list[Trial]:
    """The trials of a grid, or of draws."""
    count = config.max_trials
    return resolve(config, space.grid()[:count] if config.search == "grid" else space.drawn(count, config.train.seed))


def _known(config: TuneConfig) -> list[Trial]:
    """Trials in the folder that are of these settings."""
    found = []
    for result in trials.results_in(config.output):
        try:
            t = resolve_trial(config, result["point"], result["seed"])
        except ValueError:
            continue
        found += [t] if t.name == result["name"] else []
    return found


def _check(config: TuneConfig, space: Space, manifest: Manifest) -> None:
    """Raise ValueError for what would only show after hours."""
    known = results.METRICS[config.evaluate.extractor]
    require(space.metric in known, "metric", space.metric,
            f"no trial reports it; evaluate.extractor = {config.evaluate.extractor!r} gives {', '.join(sorted(known))}")
    if config.search != "grid":
        require(config.max_trials is not None, "max_trials", None, f"search = {config.search!r} has no end without")
    if config.search == "optuna":
        space.drawn(1, 0)
        require(config.num_seeds == 1, "num_seeds", config.num_seeds, "must be 1 for search = 'optuna'; try its best points "
                "again with more seeds, as a list of trials in a space of your own")
    if config.scheduler != "none":
        steps = config.train.validate_every_steps
        require(manifest.num_train < manifest.num_rows, "scheduler", config.scheduler, "needs a validation loss, but the "
                "latents hold out no image; precompute with --validation-share 0.01, or use --scheduler none")
        require(0 < steps < config.train.num_steps, "train.validate_every_steps", steps, f"must be in 1 .. "
                f"train.num_steps - 1 for scheduler = {config.scheduler!r}, which goes by the validation loss")


def settled(config: TuneConfig, space: Space) -> TuneConfig:
    """The config without None: what nobody gave is the space's choice, or the default."""
    defaults = DEFAULTS | space.defaults
    return dataclasses.replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})


def objective(config: TuneConfig, space: Space) -> str:
    """Name of the metric that ranks the trials; it carries the number of samples, since it is no full evaluation."""
    return results.metric_name(space.metric, config.evaluate.extractor, config.evaluate.num_samples)


def _written(config: TuneConfig, space: Space, wanted: list[Trial]) -> dict[str, Any]:
    """results.json: points best first, and what became of each trial."""
    metric = objective(config, space)
    ended = [result for t in wanted if (result := t.result()) is not None]
    by_status = {status: [r for r in ended if r["status"] == status] for status in (FINISHED, STOPPED, FAILED)}
    finished, failed = by_status[FINISHED], by_status[FAILED]
    if config.search == "optuna":
        failed += [r for r in trials.results_in(config.output) if r["name"].startswith(trials.INVALID)]
    left = len(wanted) - len(ended)
    if left:
        raise RuntimeError(f"{left} of {len(wanted)} trials did not end; run the same command again to go on with them")
    if not finished:
        raise RuntimeError(f"all {len(failed)} trials failed, the first one: {failed[0]['reason']}; mend what is wrong, and "
                           "--retry-failed runs them again")
    rows = compare.ranked(finished, metric, space.mode)
    order = [row.point for row in rows]
    table = {"metric": metric, "mode": space.mode, "space": space.described(),
             "points": [_plain(row, space) for row in rows],
             "trials": sorted(finished, key=lambda r: (order.index(r["point"]), r["seed"])),
             "stopped": by_status[STOPPED], "failed": failed}
    uri = storage.join(config.output, RESULTS)
    if not storage.exists(uri) or storage.read_json(uri) != table:
        storage.write_json(uri, table)
    return table


def _plain(row: compare.Row, space: Space) -> dict[str, Any]:
    found = {"point": row.point, "mean": row.estimate.mean, "half_width": row.estimate.half_width,
             "num_seeds": row.estimate.num_seeds, "to_best": None}
    if row.to_best:
        found["to_best"] = dataclasses.asdict(row.to_best) | {"is_noise": row.to_best.is_noise}
    return found | ({"published": space.paper.value(row.point)} if space.paper else {})
