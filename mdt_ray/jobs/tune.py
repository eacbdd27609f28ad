"""Job `tune`: points of a space, each trained and judged as trials of Ray Tune, then ranked.

The ledger is ours (tuning/trials.py), not Tune's pickled state: the same command again runs the trials that have no result,
from their newest checkpoints, and no other.
"""

import contextlib
import dataclasses
import io
import shlex
from typing import Any, NamedTuple

import numpy as np
import pyarrow.csv as pacsv

from mdt_ray import config_io, run_folder, storage, tables
from mdt_ray.config import TuneConfig, require
from mdt_ray.data import latents
from mdt_ray.data.latents import Manifest
from mdt_ray.evaluation import chunks, results
from mdt_ray.interrupts import Stopped, stop_signals
from mdt_ray.jobs import evaluate as evaluating
from mdt_ray.jobs import preflight, search, session
from mdt_ray.jobs.budget import Budget
from mdt_ray.jobs.trial import EVALUATE, resolve, resolve_trial
from mdt_ray.report import sweep
from mdt_ray.tuning import compare, trials
from mdt_ray.tuning.lines import named
from mdt_ray.tuning.space import Space, load_space
from mdt_ray.tuning.trials import FAILED, FINISHED, STOPPED, Trial

RESULTS = "results.json"
BEST, BEST_EVALUATE = "best.toml", "best-evaluate.toml"
FULL_SAMPLES = 50_000
"""As the published protocol."""
DEFAULTS = {"search": "grid", "scheduler": "none", "cost": "none", "equal": "steps", "num_seeds": 1}


class _Wanted(NamedTuple):
    """The trials of a sweep, as far as they are known yet."""

    trials: list[Trial]
    invalid: list[dict[str, Any]]
    """Results of suggested points that are no valid settings."""
    num_wanted: int

    @property
    def num_left(self) -> int:
        """Trials that have not ended, or are still to be suggested."""
        return self.num_wanted - len(self.invalid) - sum(t.result() is not None for t in self.trials)


def tune(config: TuneConfig) -> dict[str, Any]:
    """Run the trials that have no result yet; returns the content of results.json.

    Raises ValueError for a bad space or setting before anything starts, RuntimeError where trials did not end though nobody
    asked them to stop, or none finished, and Stopped after a signal, with checkpoints of the running trials written.
    """
    budget = Budget(config)
    config, space, run, wanted = _prepared(config)
    again = [t for t in wanted.trials if config.retry_failed and (t.result() or {}).get("status") == FAILED]
    is_work = wanted.num_left or again
    reason = budget.used_up() if is_work else None
    if is_work and not reason:
        wish = session.start_heeding(dashboard=True)
        if wish.signum is None:
            with run_folder.claim(config.output, run) as claim, stop_signals() as wish:
                preflight.check_nodes(dataclasses.replace(config.train, output=config.output),
                                      latents.open_manifest(config.train.latents))
                for t in again:
                    storage.remove(t.folder)
                shared = search.Sweep(config, objective(config, space), claim, budget, wish)
                if config.search == "optuna":
                    reason = search.run_suggested(shared, space, wanted.trials, [r["point"] for r in wanted.invalid],
                                                  wanted.num_wanted)
                    wanted = _wanted(config, space)
                else:
                    reason = search.run_listed(shared, wanted.trials)
        if wish.signum is not None:
            with contextlib.suppress(RuntimeError):  # nothing has finished
                _written(config, space, run, wanted, "stopped")
            raise Stopped(wish.signum, f"stopped; {wanted.num_wanted - wanted.num_left} of {wanted.num_wanted} trials have "
                                       "ended, the others keep their checkpoints")
    return _written(config, space, run, wanted, reason)


def preview(config: TuneConfig) -> str:
    """What `tune` would run, in a line. Raises ValueError as `tune`, and starts and writes nothing."""
    config, space, _, wanted = _prepared(config)
    seeds = "" if config.num_seeds == 1 else f" with {config.num_seeds} seeds each"
    return (f"{space.name}: {wanted.num_wanted} trials{seeds}, of which {wanted.num_wanted - wanted.num_left} have ended; "
            f"ranked by {objective(config, space)}; search {config.search}, scheduler {config.scheduler}")


def summary(output: str, table: dict[str, Any]) -> str:
    """What came of a sweep, and the commands that follow; `table` as `tune` returns it."""
    best, others = table["points"][0], table["points"][1:]
    spread = "" if best["half_width"] is None else f" +- {best['half_width']:.2g} ({best['num_seeds']} seeds)"
    noise = [p for p in others if p["to_best"] is None or p["to_best"]["is_noise"] is not False]
    counts = {"ended early": len(table["stopped"]), "failed": len(table["failed"])}
    rest = [f"{n} trial{'s' * (n > 1)} {what}" for what, n in counts.items() if n]
    rest += [f"{table['left']} trials are left: {table['left_because']}"] if table["left"] else []
    rest += [f"{len(noise)} of {len(others)} others may differ from it by noise only"] if noise else []
    return "\n".join([
        f"best of {len(table['points'])} point{'s' * bool(others)}: {named(best['point'])}: {table['metric']} "
        f"{best['mean']:.4g}{spread}", *rest, "train it again, and judge it by more samples:",
        *(f"  {line}" for line in _follow_up(output)), f"report {storage.join(output, 'report/index.html')}"])


def _follow_up(output: str) -> list[str]:
    return [f"mdt-ray {job} --config {shlex.quote(storage.join(output, name))}"
            for job, name in (("train", BEST), ("evaluate", BEST_EVALUATE))]


def _prepared(config: TuneConfig) -> tuple[TuneConfig, Space, dict[str, Any], _Wanted]:
    """The settings without open ones, the space, the content of run.json, and the trials; all that can be is checked."""
    require(bool(config.evaluate.reference), "evaluate.reference", "", "not given; name real images, or statistics of them")
    space = load_space(config.space)
    config = _absolute(settled(config, space))
    manifest = latents.open_manifest(config.train.latents)
    run = run_folder.describe("tune", config, {"latents": manifest.content} | _judged_alike(config, space, manifest))
    run_folder.check_identity(config.output, run)
    _check(config, space, manifest)
    try:
        return config, space, run, _wanted(config, space)
    except ValueError as error:
        raise ValueError(f"space {space.name!r}: {error}") from error


def _wanted(config: TuneConfig, space: Space) -> _Wanted:
    """Of a grid or of draws all trials; else those that the folder holds of this search."""
    if config.search != "optuna":
        count = config.max_trials
        points = space.grid()[:count] if config.search == "grid" else space.drawn(count, config.train.seed)
        listed = resolve(config, points)
        return _Wanted(listed, [], len(listed))
    found, invalid = [], []
    for held in trials.begun_in(config.output):
        if held["seed"] != config.train.seed or held["point"].keys() != space.values.keys():
            continue  # of another search
        try:
            t = resolve_trial(config, held["point"], held["seed"])
        except ValueError:
            invalid += [held] if held["name"].startswith(trials.INVALID) else []
        else:
            found += [t] if t.name == held["name"] else []
    return _Wanted(found, invalid, max(min(config.max_trials, space.num_points), len(found) + len(invalid)))


def _absolute(config: TuneConfig) -> TuneConfig:
    """With absolute paths: trials run in folders of their own."""
    train = config.train
    return dataclasses.replace(
        config, output=storage.absolute(config.output), evaluate=evaluating.absolute(config.evaluate),
        train=dataclasses.replace(train, latents=storage.absolute(train.latents),
                                  init_from=train.init_from and storage.absolute(train.init_from)))


def _judged_alike(config: TuneConfig, space: Space, manifest: Manifest) -> dict[str, Any]:
    """What judges all trials of a folder, beyond the settings that name an evaluation.

    Raises ValueError for a reference that cannot be read, does not fit the images, or lacks what the objective needs.
    """
    evaluate = config.evaluate
    known = results.METRICS[evaluate.extractor]
    require(space.metric in known, "metric", space.metric, "no trial reports it; evaluate.extractor = "
            f"{evaluate.extractor!r} gives {', '.join(sorted(known))} (named so, without extractor and number of samples)")
    measured, statistics, hashes = evaluating.open_reference(evaluate, manifest.image_size, config.output, {})
    require(measured is not None or space.metric not in results.OF_PICTURES, "metric", space.metric,
            f"needs the pictures of the reference, but {evaluate.reference} has statistics alone; name real images")
    require(measured is not None or space.metric != "sfid" or statistics.mu_s is not None, "metric", space.metric,
            f"needs mu_s and sigma_s, which {evaluate.reference} lacks; name real images")
    return hashes | {"adm_float16": evaluate.adm_float16, "num_seed_ranges": evaluate.num_seed_ranges}


def _check(config: TuneConfig, space: Space, manifest: Manifest) -> None:
    """Raise ValueError for what would only show after hours."""
    settings = config_io.to_dict(config.train)
    known, telling = config_io.flatten(settings), config_io.flatten(config_io.identity_fields(config.train))
    for key in dict.fromkeys(key for point in ([space.values] if isinstance(space.values, dict) else space.values)
                             for key in point):
        if key.startswith(EVALUATE):
            require(key.startswith(EVALUATE + "sampling."), "space", key, "trials that are judged in different ways cannot "
                    f"be ranked; only {EVALUATE}sampling may differ")
        elif key.startswith("train."):
            require(False, "space", key, f"the settings of training have no prefix here; write {key[6:]!r}")
        elif key in known:
            require(key != "seed", "space", key, "all points have the same seeds; give --num-seeds")
            require(key in telling or key == "num_steps", "space", key, "is the same for all trials, and changes no result; "
                    f"give --train.{key.replace('_', '-')}")
    if config.search != "grid":
        require(config.max_trials is not None, "max_trials", None,
                f"search = {config.search!r} has no end without; give --max-trials")
    if config.search == "optuna":
        space.drawn(1, 0)
        require(config.scheduler == "none" or not any(key.startswith(EVALUATE) for key in space.values), "scheduler",
                config.scheduler, "would end a training that other suggested points of evaluate.sampling share; give "
                "--scheduler none, or --search grid")
        require(config.num_seeds == 1, "num_seeds", config.num_seeds, "must be 1 for search = 'optuna'; try its best points "
                "again with more seeds, as a list of trials in a space of your own")
    if config.scheduler != "none":
        steps = config.train.validate_every_steps
        require(manifest.num_train < manifest.num_rows, "scheduler", config.scheduler, "needs a validation loss, but the "
                "latents hold out no image; precompute with --validation-share 0.01, or use --scheduler none")
        require(0 < steps < config.train.num_steps, "train.validate_every_steps", steps, f"must be in 1 .. "
                f"train.num_steps - 1 for scheduler = {config.scheduler!r}, which goes by the validation loss; give "
                f"--train.validate-every-steps {max(config.train.num_steps // 10, 1)}")


def settled(config: TuneConfig, space: Space) -> TuneConfig:
    """The config without None: what nobody gave is the space's choice, or the default."""
    defaults = DEFAULTS | space.defaults
    return dataclasses.replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})


def objective(config: TuneConfig, space: Space) -> str:
    """Name of the metric that ranks the trials; it carries the number of samples, since it is no full evaluation."""
    return results.metric_name(space.metric, config.evaluate.extractor, config.evaluate.num_samples)


def _written(config: TuneConfig, space: Space, run: dict[str, Any], wanted: _Wanted,
             reason: str | None) -> dict[str, Any]:
    """results.json: points best first, and what became of each trial.

    reason: why trials were asked to stop, if they were.
    Raises RuntimeError where none finished, and, with the table written, where some did not end though nobody asked.
    """
    metric = objective(config, space)
    # (A trial may have been run for another space, whose points say the same in another form.)
    ended = [result | {"point": t.point, "seed": t.seed}
             for t in wanted.trials if (result := t.result()) is not None]
    by_status = {status: [r for r in ended if r["status"] == status] for status in (FINISHED, STOPPED, FAILED)}
    finished, failed, left = by_status[FINISHED], by_status[FAILED] + wanted.invalid, wanted.num_left
    lost = f"{left} of {wanted.num_wanted} trials did not end; run the same command again to go on with them"
    if left and not finished:
        raise RuntimeError(f"{reason} before any trial finished; their checkpoints are kept, and the same command goes on, "
                           "with more where all of it is used" if reason else lost)
    if not finished and not failed:
        raise RuntimeError(f"all {len(by_status[STOPPED])} trials were ended early; give them more by --grace-share")
    if not finished:
        raise RuntimeError(f"all {len(failed)} trials failed, the first one: {failed[0]['reason']}; mend what is wrong, and "
                           "--retry-failed runs them again")
    rows = compare.ranked(finished, metric, space.mode)
    order = [row.point for row in rows]
    table = {"about": _about(config, space), "metric": metric, "mode": space.mode, "space": space.described(),
             "paper": space.paper and space.paper.column,
             "points": [_plain(row, space) for row in rows],
             "trials": sorted(finished, key=lambda r: (order.index(r["point"]), r["seed"])),
             "stopped": by_status[STOPPED], "failed": failed, "left": left,
             "left_because": (reason or "they did not end") if left else None}
    uri = storage.join(config.output, RESULTS)
    if not storage.exists(uri) or storage.read_json(uri) != table:
        with run_folder.claim(config.output, run):
            _write_report(config, table, {t.name: t for t in wanted.trials})
            storage.write_json(uri, table)
    if left and not reason:
        raise RuntimeError(lost)
    return table


def _about(config: TuneConfig, space: Space) -> str:
    """What the trials have in common, for people."""
    train = config.train
    return (f"Space {space.name}, search {config.search}, scheduler {config.scheduler}; {config.num_seeds} "
            f"seed{'s' * (config.num_seeds > 1)}; {train.num_steps} steps of {train.batch_size} images"
            f"{' for the base, others as much as that costs' * (config.equal == 'flops')}; latents {train.latents}")


def _write_report(config: TuneConfig, table: dict[str, Any], by_name: dict[str, Trial]) -> None:
    """The page, a row a trial as Parquet and CSV, and the best point's settings: to train it again, and to judge it in full.
    """
    best = by_name[table["trials"][0]["name"]]

    def at(name: str) -> str:
        return storage.join(config.output, name)

    train = dataclasses.replace(best.train, output=at("best/train"))
    judged = dataclasses.replace(best.evaluate, checkpoint=train.output, output=at("best/evaluate"),
                                 num_samples=FULL_SAMPLES)
    settings = config_io.to_toml(train)
    sweep.write(config.output, table, settings, _follow_up(config.output),
                cost=config.cost if config.cost != "none" else "train_seconds", pictures=lambda name: _drawn(by_name[name]))
    storage.write_bytes(at(BEST), settings.encode())
    storage.write_bytes(at(BEST_EVALUATE), config_io.to_toml(judged).encode())
    rows = trials.as_table([*table["trials"], *table["stopped"], *table["failed"]])
    tables.write(at("trials.parquet"), rows)
    with io.BytesIO() as text:
        pacsv.write_csv(rows, text)
        storage.write_bytes(at("trials.csv"), text.getvalue())


def _drawn(t: Trial) -> np.ndarray:
    """The first samples of its last checkpoint, (n, H, W, 3) uint8."""
    judged = dataclasses.replace(t.evaluate, output=t.judged(t.train.num_steps))
    return chunks.kept_images(chunks.uris_of(judged), judged.keep_images)[0]


def _plain(row: compare.Row, space: Space) -> dict[str, Any]:
    found = {"point": row.point, "mean": row.estimate.mean, "half_width": row.estimate.half_width,
             "num_seeds": row.estimate.num_seeds, "to_best": None,
             "published": space.paper.value(row.point) if space.paper else None}
    if row.to_best:
        found["to_best"] = dataclasses.asdict(row.to_best) | {"is_noise": row.to_best.is_noise}
    return found
