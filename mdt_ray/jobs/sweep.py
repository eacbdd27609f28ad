"""Job `evaluate sweep`: one checkpoint, many settings of sampling -> the frontier of FID and IS. Not training: `tune`.

All are one job: an actor loads a model once for all settings with the same weights, and the real images are measured once.

    settings/<hash>/      an evaluation, as `evaluate` writes it
    frontier.png          FID over Inception Score
    best.json             settings of `evaluate` (--config) of the lowest FID
    results.json          all settings with their metrics, lowest FID first; written last
"""

import dataclasses
import itertools
from typing import Any

from mdt_ray import config_io, run_folder, storage
from mdt_ray.config import NUM_TIMESTEPS, EvaluateConfig, SamplingConfig, SweepConfig
from mdt_ray.evaluation.frontier import Point
from mdt_ray.evaluation.results import metric_name
from mdt_ray.jobs.evaluate import evaluate_many, plan
from mdt_ray.report import figures

RESULTS = "results.json"
KEYS = ("weights", "num_sampling_steps", "cfg_scale", "cfg_power", "cfg_interval")
"""What is varied."""


def settings_of(config: SweepConfig) -> list[SamplingConfig]:
    """Every combination, each once: without guidance its schedule means nothing. Raises ValueError for bad values."""
    base = config.evaluate.sampling
    values = [getattr(config, key) or (getattr(base, key),) for key in KEYS]
    found: dict[SamplingConfig, None] = {}
    for point in itertools.product(*values):
        changes = dict(zip(KEYS, point, strict=True))
        if changes["cfg_interval"] is not None and tuple(changes["cfg_interval"]) == (0, NUM_TIMESTEPS - 1):
            changes["cfg_interval"] = None
        if changes["cfg_scale"] == 1:
            changes |= {"cfg_power": 0.0, "cfg_interval": None, "guide": ""}
        found[dataclasses.replace(base, **changes)] = None
    return sorted(found, key=lambda s: (values[0].index(s.weights), bool(s.guide)))  # an actor holds one set of networks


def sweep(config: SweepConfig) -> dict[str, Any]:
    """Evaluate every setting that is not yet; returns the content of results.json.

    Raises ValueError as `evaluate`, before anything is drawn.
    """
    config = dataclasses.replace(config, output=storage.absolute(config.output))
    configs = [_evaluation(config, sampling) for sampling in settings_of(config)]
    known: dict[Any, Any] = {}
    first = plan(configs[0], config.output, known)
    run = run_folder.describe("evaluate sweep", config, first.inputs)
    run_folder.check_identity(config.output, run)
    with run_folder.claim(config.output, run):
        found = evaluate_many(configs, config.output, known=known)
        fid, score = axes(found[0])
        rows = [{**{key: f["sampling"][key] for key in KEYS}, "metrics": f["metrics"], "output": c.output}
                for f, c in zip(found, configs, strict=True)]
        rows.sort(key=lambda row: row["metrics"][fid])
        best = plan(next(c for c in configs if c.output == rows[0]["output"]), config.output, known).config
        table = {"metric": fid, "trials": rows}
        storage.write_bytes(storage.join(config.output, "frontier.png"), _picture(rows, fid, score))
        storage.write_json(storage.join(config.output, "best.json"), config_io.to_dict(
            dataclasses.replace(best, output=storage.join(config.output, "best"), num_samples=50_000)))
        storage.write_json(storage.join(config.output, RESULTS), table)
    return table


def axes(found: dict[str, Any]) -> tuple[str, str]:
    """Names of the metrics of the picture: a distance, and the Inception Score or, without one, recall."""
    names = {key: metric_name(key, found["extractor"], found["num_samples"]) for key in ("fid", "is", "recall")}
    return names["fid"], names["is"] if names["is"] in found["metrics"] else names["recall"]


def _evaluation(config: SweepConfig, sampling: SamplingConfig) -> EvaluateConfig:
    name = config_io.fingerprint({key: getattr(sampling, key) for key in KEYS})
    return dataclasses.replace(config.evaluate, sampling=sampling, output=storage.join(config.output, "settings", name))


def _picture(rows: list[dict[str, Any]], fid: str, score: str) -> bytes:
    varied = [key for key in KEYS if len({str(row[key]) for row in rows}) > 1]

    def group(row: dict[str, Any]) -> str:
        return ", ".join(f"{_word(key)} {_brief(row[key])}" for key in varied if key != "cfg_scale") or "guidance"

    points = [Point(x=row["metrics"][score], y=row["metrics"][fid], label=f"scale {_brief(row['cfg_scale'])}",
                    group=group(row)) for row in rows]
    return figures.frontier(points, score, fid)


def _word(key: str) -> str:
    return {"num_sampling_steps": "steps"}.get(key, key.removeprefix("cfg_"))


def _brief(value: Any) -> str:
    if value is None:
        return "all"
    if isinstance(value, list | tuple):
        return "-".join(map(str, value))
    return value if isinstance(value, str) else f"{value:g}"
