"""tune on a real Ray: what it runs, records, leaves out the next time, and refuses before anything starts."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray._private import state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mdt_ray import checkpoints, config_io, presets, run_folder, storage
from mdt_ray.config import EvaluateConfig, TrainConfig, TuneConfig
from mdt_ray.evaluation import reference
from mdt_ray.jobs.trial import resolve
from mdt_ray.jobs.tune import settled, tune
from mdt_ray.tuning.space import load_space
from tests import harness
from tests.conftest import ROOT
from tests.helpers import Page, make_latents
from tests.jobs.test_survival import start


@pytest.fixture(scope="module")
def latents(tmp_path_factory, ray_session) -> str:
    folder = str(tmp_path_factory.mktemp("tune") / "latents")
    harness.run_here(["precompute", "digits", "--output", folder, "--workers.num-workers", "1"])
    return folder


def sweep(folder, latents, space: str, **changes) -> TuneConfig:
    """Trials of a few seconds, of the points that `space` is the text of."""
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(f"metric = 'fid'\ndef space():\n    return {space}\n")
    return config_io.override(presets.digits().tune, {
        "output": str(folder / "out"), "space": str(folder / "own.py"), "train.latents": latents, "train.num_steps": 10,
        "train.checkpoint_every_steps": 5, "train.keep_every_steps": 5, "train.log_every_steps": 5,
        "train.validate_every_steps": 5, "evaluate.num_samples": 40} | changes)


def results_of(folder) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in (folder / "out" / "trials").glob("*/result.json")}


@pytest.mark.ray
@pytest.mark.slow
def test_trials_are_run_once_whatever_becomes_of_them(latents, tmp_path):
    """Two seeds of four points, of which one diverges and one finds no memory; then the same again; then a third seed of
    three, with a retry."""
    space = "[{'loss.mask_ratio': 0.3}, {'loss.mask_ratio': 0.6}, {'optim.lr': 1e30}, {'model.hidden_size': 400000}]"
    config = sweep(tmp_path, latents, space, num_seeds=2)
    table = tune(config)
    assert table["metric"] == "fid_digits_40"
    assert [len(table[key]) for key in ("points", "trials", "failed")] == [2, 4, 4]
    best, other = table["points"]
    assert best["mean"] < other["mean"]
    assert best["num_seeds"] == 2
    assert best["half_width"] > 0
    pairs = [[t["metrics"]["fid_digits_40"] for t in table["trials"] if t["point"] == p["point"]] for p in (best, other)]
    assert other["to_best"]["mean"] == pytest.approx(sum(b - a for a, b in zip(*pairs, strict=True)) / 2)
    for result in table["failed"]:
        expected = "(ValueError|TrainingDiverged): " if "optim.lr" in result["point"] else "RuntimeError: .*can't allocate"
        assert re.match(expected, result["reason"])
    for trial in table["trials"]:
        assert [judged["step"] for judged in trial["judged"]] == [5, 10], "kept checkpoints are judged too"
        assert trial["judged"][-1]["metrics"] == trial["metrics"]
        assert [judged["images_seen"] for judged in trial["judged"]] == [480, 960]
        assert 0 < trial["judged"][0]["train_seconds"] < trial["train_seconds"] < trial["seconds"]
        assert "val_loss" in trial["curve"][-1]
    assert not (tmp_path / "out" / "ray").exists()

    def times() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}

    before = times()
    assert tune(config) == table
    assert times() == before, "nothing was run or written again"
    config = sweep(tmp_path, latents, space.replace("{'loss.mask_ratio': 0.6}, ", ""), num_seeds=3, retry_failed=True)
    held = results_of(tmp_path)
    with run_folder.claim(config.output, storage.read_json(f"{config.output}/run.json")), \
            pytest.raises(ValueError, match="is being written by process"):
        tune(config)
    assert results_of(tmp_path) == held, "who may not write deletes nothing"
    wider = tune(config)
    assert [len(wider[key]) for key in ("points", "trials", "failed")] == [1, 3, 6]
    changed = {name for name, result in results_of(tmp_path).items() if result != held.get(name)}
    assert changed == {t["name"] for t in wider["failed"]} | ({t["name"] for t in wider["trials"]} - held.keys())


@pytest.mark.ray
@pytest.mark.slow
def test_ways_to_judge_share_a_training(latents, tmp_path):
    config = sweep(tmp_path, latents, "{'evaluate.sampling.cfg_scale': [1.0, 3.0], 'loss.mask_ratio': [0.3]}")
    table = tune(config)
    assert len(table["trials"]) == 2
    assert len(list((tmp_path / "out" / "trainings").iterdir())) == 1
    assert table["trials"][0]["curve"] == table["trials"][1]["curve"]
    assert table["trials"][0]["metrics"] != table["trials"][1]["metrics"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_of_several_workers_is_that_of_one(latents, tmp_path):
    found = []
    for workers in (1, 2):
        config = sweep(tmp_path / str(workers), latents, "{'loss.mask_ratio': [0.3]}",
                       **{"train.workers.num_workers": workers, "train.precision": "fp32"})
        found.append(tune(config)["trials"][0])
    one, two = ([row["loss"] for row in trial["curve"]] for trial in found)
    assert one == pytest.approx(two, rel=1e-5)
    assert found[0]["name"] == found[1]["name"], "the number of workers is no part of what a trial is"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_trials_that_do_not_learn_end_early_and_stay_so(latents, tmp_path, scheduler):
    """Learning rates from good to none, and one that fails, one trial after the other, so that each is compared with those
    before."""
    rates = [4e-3, 2e-3, 1e30, 1e-3, 1e-6, 1e-7, 1e-8]
    config = sweep(tmp_path, latents, f"{{'optim.lr': {rates}}}", scheduler=scheduler, max_concurrent_trials=1, **{
        "train.num_steps": 40, "train.checkpoint_every_steps": 40, "train.keep_every_steps": 0, "grace_share": 0.25,
        "train.optim.warmup_steps": 0, "train.ema.decay": 0.5})
    table = tune(config)
    stopped = {result["point"]["optim.lr"] for result in table["stopped"]}
    assert stopped & {1e-6, 1e-7, 1e-8}
    assert 4e-3 in {result["point"]["optim.lr"] for result in table["trials"]}
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == len(rates) - 1, "all but the failed one"
    for result in table["stopped"]:
        assert 10 <= result["curve"][-1]["step"] < 40, "after its grace, before its end"
        assert result["reason"].startswith(f"{scheduler}: its val_loss was among the worse at step")
    assert [result["point"]["optim.lr"] for result in table["failed"]] == [1e30]
    assert len(table["stopped"]) + len(table["trials"]) == len(rates) - 1
    held = results_of(tmp_path)
    (tmp_path / "out" / "trials" / table["trials"][0]["name"] / "result.json").unlink()
    again = tune(config)
    assert {name: r for name, r in results_of(tmp_path).items() if name in held and r["status"] == "stopped"} == {
        name: r for name, r in held.items() if r["status"] == "stopped"}
    assert [t["metrics"] for t in again["trials"]] == [t["metrics"] for t in table["trials"]]


@pytest.mark.ray
@pytest.mark.slow
def test_workers_of_a_trial_that_ends_early_end_with_it(latents, tmp_path):
    rates = [4e-3, 2e-3, 1e-7, 1e-8]
    config = sweep(tmp_path, latents, f"{{'optim.lr': {rates}}}", scheduler="asha", max_concurrent_trials=1, **{
        "train.num_steps": 60, "train.checkpoint_every_steps": 60, "train.keep_every_steps": 0, "grace_share": 0.25,
        "train.optim.warmup_steps": 0, "train.ema.decay": 0.5, "train.workers.num_workers": 2})
    table = tune(config)
    assert {result["point"]["optim.lr"] for result in table["stopped"]} & {1e-7, 1e-8}
    assert len(table["stopped"]) + len(table["trials"]) == 4
    assert harness.ray_process("RayTrainWorker") is None
    assert harness.open_placement_groups() == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("cost", ["none", "num_parameters"])
def test_optuna_goes_on_from_what_is_known(latents, tmp_path, cost):
    """Eight blocks cannot have nine in their decoder: such a point is written down as failed, and others are suggested."""
    space = "{'loss.mask_ratio': ray.tune.uniform(0.1, 0.8), 'model.decode_layer': [1, 2, 9]}"
    config = sweep(tmp_path, latents, space, search="optuna", max_trials=4, cost=cost, max_concurrent_trials=1,
                   **{"train.keep_every_steps": 0})
    (tmp_path / "own.py").write_text("import ray.tune\n" + (tmp_path / "own.py").read_text())
    first = tune(config)
    assert len(first["trials"]) + len(first["failed"]) == 4
    assert all(r["point"]["model.decode_layer"] == 9 for r in first["failed"])
    held = results_of(tmp_path)
    assert len(held) == 4, "invalid points count"
    assert tune(config) == first
    assert results_of(tmp_path) == held, "all is done"
    lost = tmp_path / "out" / "trials" / first["trials"][0]["name"]
    (lost / "result.json").unlink()
    assert tune(config)["points"] == first["points"], "one that had begun is run again, and no other in its place"
    assert results_of(tmp_path).keys() == held.keys()
    held = results_of(tmp_path)
    more = tune(dataclasses.replace(config, max_trials=6))
    assert len(more["trials"]) + len(more["failed"]) == 6
    assert {name: result for name, result in results_of(tmp_path).items() if name in held} == held
    assert {t["name"] for t in first["trials"]} < {t["name"] for t in more["trials"]}


@pytest.mark.ray
@pytest.mark.slow
def test_optuna_ends_where_the_space_does(latents, tmp_path):
    """Two pairs of trials share a training each, and two processes could run at the same time."""
    space = "{'loss.mask_ratio': [0.3, 0.6], 'evaluate.sampling.cfg_scale': [1.0, 2.0]}"
    config = sweep(tmp_path, latents, space, search="optuna", max_trials=9, max_concurrent_trials=2,
                   **{"train.keep_every_steps": 0})
    table = tune(config)
    assert len(table["trials"]) == len(table["points"]) == 4
    assert (table["left"], table["failed"]) == (0, [])
    assert len(list((tmp_path / "out" / "trainings").iterdir())) == 2
    assert tune(config) == table


@pytest.mark.ray
@pytest.mark.slow
def test_random_points_are_drawn_alike_each_time(latents, tmp_path):
    config = sweep(tmp_path, latents, "{'loss.mask_ratio': [0.1, 0.3, 0.5], 'model.decode_layer': [1, 2]}", search="random",
                   max_trials=2, **{"train.keep_every_steps": 0})
    first = tune(config)
    held = results_of(tmp_path)
    more = tune(dataclasses.replace(config, max_trials=3))
    assert {t["name"] for t in first["trials"]} <= {t["name"] for t in more["trials"]}
    assert {name: result for name, result in results_of(tmp_path).items() if name in held} == held


def test_a_trial_is_named_by_all_that_its_result_depends_on(tmp_path):
    make_latents(tmp_path / "latents")

    def names(space: str = "{'loss.mask_ratio': [0.3, 0.6]}", **changes) -> set[str]:
        config = sweep(tmp_path / "x", str(tmp_path / "latents"), space, **changes)
        space = load_space(config.space)
        return {t.name for t in resolve(settled(config, space), space.grid())}

    first = names()
    assert len(first) == 2
    assert names(**{"max_concurrent_trials": 7, "train.workers.num_workers": 2, "train.log_every_steps": 1}) == first
    assert names("{'loss.mask_ratio': [0.6]}") < first
    assert names(num_seeds=2) > first
    for changes in ({"train.num_steps": 11}, {"train.optim.lr": 1e-5}, {"evaluate.num_samples": 41}, {"train.seed": 5},
                    {"train.keep_every_steps": 2}):
        assert not names(**changes) & first, changes
    same = names("[{'loss.mask_ratio': 0.3}, {'loss.mask_ratio': 0.3, 'model.decode_layer': 2}]")
    assert len(same) == 1, "two ways to say the same are one trial"


def test_trials_of_equal_cost_have_as_many_steps_as_that_takes(tmp_path):
    """The masked pass costs less than the full one, and both together the sum."""
    make_latents(tmp_path / "latents")
    config = sweep(tmp_path / "x", str(tmp_path / "latents"), "{'loss.passes': ['full+masked', 'full', 'masked']}",
                   equal="flops", **{"train.num_steps": 1000, "train.optim.schedule_steps": 500})
    space = load_space(config.space)
    both, full, masked = resolve(settled(config, space), space.grid())
    assert both.train.num_steps == 1000
    assert 1 / full.train.num_steps + 1 / masked.train.num_steps == pytest.approx(1 / 1000, rel=0.01)
    assert 1000 < full.train.num_steps < masked.train.num_steps
    assert full.train.optim.schedule_steps == pytest.approx(full.train.num_steps / 2, abs=1)


def test_bad_spaces_are_refused_before_anything_starts(tmp_path):
    make_latents(tmp_path / "latents")

    def refused(space: str, message: str, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            tune(sweep(tmp_path, str(tmp_path / "latents"), space, **changes))

    refused("{'loss.mask_ration': [0.3]}", r"unknown setting 'loss.mask_ration'; did you mean 'loss.mask_ratio'")
    refused("{'evaluate.sampling.cfg_scales': [1.0]}",
            r"own': unknown setting 'evaluate.sampling.cfg_scales'; did you mean 'evaluate.sampling.cfg_")
    refused("{'train.loss.mask_ratio': [0.3]}", "the settings of training have no prefix here; write 'loss.mask_ratio'")
    refused("{'loss.mask_ratio': [0.3, 1.5]}", r"loss.mask_ratio = 1.5")
    for key in ("workers.num_workers", "compile", "latents"):
        refused(f"{{'{key}': [1, 2]}}", f"space = '{key}': is the same for all trials, and changes no result; give --train.")
    refused("{'seed': [0, 1]}", "space = 'seed': all points have the same seeds; give --num-seeds")
    refused("{'evaluate.num_samples': [40, 50]}", "space = 'evaluate.num_samples': trials that are judged in different ways")
    refused("{'loss.mask_ratio': [0.3]}", "num_seeds = 0: must be at least 1", num_seeds=0)
    some = "{'loss.mask_ratio': [0.3, 0.6]}"
    refused(some, "max_trials = None: search = 'random' has no end without", search="random")
    refused("[{'loss.mask_ratio': 0.3}]", "lists its trials, so there is nothing to draw", search="optuna", max_trials=2)
    refused("{'evaluate.sampling.cfg_scale': [1.0, 2.0]}", "scheduler = 'asha': would end a training that other suggested",
            search="optuna", max_trials=2, scheduler="asha")
    refused(some, "num_seeds = 2: must be 1 for search = 'optuna'", search="optuna", max_trials=2, num_seeds=2)
    refused(some, "validate_every_steps = 10: must be in 1 .. train.num_steps - 1 for scheduler = 'asha'", scheduler="asha",
            **{"train.validate_every_steps": 10})
    refused(some, "grace_share = 1.0: must be in", grace_share=1.0)
    config = sweep(tmp_path, str(tmp_path / "latents"), some, **{"evaluate.extractor": "dinov2"})
    (tmp_path / "own.py").write_text((tmp_path / "own.py").read_text().replace("'fid'", "'sfid'"))
    with pytest.raises(ValueError, match=r"metric = .sfid.: no trial reports it; .* .dinov2. gives fid, kid, precision"):
        tune(config)
    refused(some, r"none.npz'?: no such file", **{"evaluate.reference": f"{tmp_path}/none.npz"})
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((10, 16, 16, 3), np.uint8))
    refused(some, "has pictures of 16 pixels, but the samples have 32", **{"evaluate.reference": f"{tmp_path}/small.npz"})
    for metric, lacks in {"recall": "needs the pictures of the reference, but", "sfid": "needs mu_s and sigma_s"}.items():
        facts = dict.fromkeys(reference.FACTS) | {"extractor": "digits"}
        bare = reference.Reference(np.zeros(64), np.eye(64), None, None, facts)
        reference.write_reference(f"{tmp_path}/statistics.npz", bare)
        config = sweep(tmp_path, str(tmp_path / "latents"), some, **{"evaluate.reference": f"{tmp_path}/statistics.npz"})
        (tmp_path / "own.py").write_text((tmp_path / "own.py").read_text().replace("'fid'", f"'{metric}'"))
        with pytest.raises(ValueError, match=f"metric = '{metric}': {lacks}"):
            tune(config)
    make_latents(tmp_path / "latents", validation_share=0)
    refused(some, "scheduler = 'asha': needs a validation loss, but the latents hold out no image; precompute",
            scheduler="asha")
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_is_stopped_and_its_budget_kept(latents, tmp_path):
    """One trial after the other, the first short enough to end; the same command with more goes on from the checkpoint."""
    config = sweep(tmp_path, latents, "[{'loss.mask_ratio': 0.3}, {'loss.mask_ratio': 0.5}]", max_concurrent_trials=1,
                   **{"train.keep_every_steps": 0})
    with pytest.raises(RuntimeError, match=r"time_limit = 1e-05 hours is reached before any trial finished; their che"):
        tune(dataclasses.replace(config, time_limit=1e-5))
    first = resolve(settled(config, load_space(config.space)), load_space(config.space).grid())[0]
    assert results_of(tmp_path) == {}
    tune(dataclasses.replace(config, space=_space(tmp_path, "first.py", "[{'loss.mask_ratio': 0.3}]")))
    spent = json.loads((tmp_path / "out" / "spent.json").read_text())["gpu_hours"]
    assert spent > 0
    part = tune(dataclasses.replace(config, max_gpu_hours=spent))
    assert (part["left"], part["left_because"]) == (1, f"max_gpu_hours = {spent:g} are used")
    assert [t["name"] for t in part["trials"]] == [first.name]
    assert "1 trials are left: max_gpu_hours" in (tmp_path / "out" / "report" / "index.html").read_text()
    whole = tune(dataclasses.replace(config, max_gpu_hours=spent + 1))
    assert (whole["left"], whole["left_because"], len(whole["trials"])) == (0, None, 2)
    assert json.loads((tmp_path / "out" / "spent.json").read_text())["gpu_hours"] > spent


def _space(folder, name: str, text: str) -> str:
    (folder / name).write_text(f"metric = 'fid'\ndef space():\n    return {text}\n")
    return str(folder / name)


@pytest.mark.ray
def test_a_sweep_leaves_its_report_and_settings_that_train_again(latents, tmp_path, monkeypatch):
    """Named from here, as a user would, latents and reference are found by trials, whose folders are others."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("real.npz", arr_0=rng.integers(0, 255, (100, 32, 32, 3), np.uint8))
    config = sweep(tmp_path, os.path.relpath(latents), "{'loss.mask_ratio': [0.3, 0.6], 'model.decode_layer': [1, 2]}",
                   max_trials=3, **{"evaluate.keep_images": 20, "evaluate.reference": "real.npz", "output": "out"})
    from ray.tune import Tuner

    fit, seen = Tuner.fit, []

    def watched(tuner):
        found = fit(tuner)
        seen.extend(path.name for path in (tmp_path / "out").rglob("*"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Tuner, "fit", watched)
        table = tune(config)
    assert "metrics.json" in seen
    assert not [name for name in seen if name.endswith(".pkl") or "experiment" in name], "Tune unpickles what it finds"
    np.savez("other.npz", arr_0=rng.integers(0, 255, (100, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"holds another run; .*\n.*inputs.reference"):
        tune(config_io.override(config, {"evaluate.reference": "other.npz"}))
    known = {(t["point"]["loss.mask_ratio"], t["point"]["model.decode_layer"]): t["metrics"] for t in table["trials"]}
    other = dataclasses.replace(config, space=_space(tmp_path, "part.py", "{'loss.mask_ratio': [0.3]}"))
    with run_folder.claim(str(tmp_path / "out"), storage.read_json("out/run.json")):
        with pytest.raises(ValueError, match=r"out is being written by process"):
            tune(other)  # which has nothing to run, but another table to write
    part = tune(other)
    assert [t["point"] for t in part["trials"]] == [{"loss.mask_ratio": 0.3}], "by its own keys"
    assert part["trials"][0]["metrics"] == known[0.3, config.train.model.decode_layer]
    assert tune(config) == table
    page = Page((tmp_path / "out" / "report" / "index.html").read_text())
    assert page.fetched == [], "nothing is loaded from outside"
    assert page.open == [], "every tag is closed"
    assert page.headings == ["Points, best first", "fid_digits_40 over the settings", "Learning", "Quality against cost",
                             "Samples of the best and the worst", "The best point in full"]
    assert len(page.images) == 4
    best = config_io.load_file(TrainConfig, tmp_path / "out" / "best.toml")
    assert {"loss.mask_ratio": best.loss.mask_ratio, "model.decode_layer": best.model.decode_layer} == table["points"][0][
        "point"]
    assert best.num_steps == 10
    judged = config_io.load_file(EvaluateConfig, tmp_path / "out" / "best-evaluate.toml")
    assert (judged.checkpoint, judged.num_samples) == (best.output, 50_000)
    rows = pq.read_table(tmp_path / "out" / "trials.parquet").to_pylist()
    assert [row["name"] for row in rows] == [t["name"] for t in table["trials"]]
    assert rows[0]["fid_digits_40"] == table["points"][0]["mean"]
    assert len((tmp_path / "out" / "trials.csv").read_text().splitlines()) == 4
    boards = sorted(path.name for path in (tmp_path / "out" / "tensorboard").iterdir())
    assert boards == ["mask_ratio-0.3_decode_layer-1_seed-0", "mask_ratio-0.3_decode_layer-2_seed-0",
                      "mask_ratio-0.6_decode_layer-1_seed-0"]
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard" / boards[0]))
    events.Reload()
    values = [event.value for event in events.Scalars("samples/fid_digits_40")]
    assert values == pytest.approx([next(t["metrics"]["fid_digits_40"] for t in table["trials"] if t["point"] == {
        "loss.mask_ratio": 0.3, "model.decode_layer": 1})])
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10]
    assert events.PluginTagToContent("hparams"), "the point is there for the HPARAMS tab"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_ends_a_sweep_in_checkpoints(latents, tmp_path, workers):
    """Also of trials whose workers are launched by Ray Train. The same command goes on."""
    output = tmp_path / "out"
    space = _space(tmp_path, "own.py", "{'loss.mask_ratio': [0.3, 0.5]}")
    command = ["tune", "digits", "--output", str(output), "--space", space, "--train.latents", latents,
               "--train.num-steps", "150", "--train.checkpoint-every-steps", "50", "--evaluate.num-samples", "40",
               "--train.workers.num-workers", str(workers), "--max-concurrent-trials", "1"]
    process = start(command)

    def newest() -> int:
        return max((checkpoints.newest_step(str(path)) for path in output.glob("trainings/*")), default=0)

    try:
        harness.wait_until(lambda: newest() >= 50, process, 240)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 130, text
    assert "stopped; 0 of 2 trials have ended, the others keep their checkpoints; this goes on:" in text
    step = newest()
    assert step % 50, f"a checkpoint of its own, not that of step {step}"
    assert harness.leftovers(output) == []
    assert harness.open_placement_groups() == []
    assert results_of(tmp_path) == {}
    if workers == 1:
        harness.run_here(command)
        assert {r["status"] for r in results_of(tmp_path).values()} == {"finished"}
        for result in results_of(tmp_path).values():
            assert [row["step"] for row in result["curve"] if row["step"] != step] == list(range(25, 151, 25))


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_that_is_to_stop_starts_no_other_trials(latents, tmp_path):
    """With early stopping each would be a process of its own, and some seconds."""
    output = tmp_path / "out"
    space = _space(tmp_path, "own.py", "{'loss.mask_ratio': [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}")
    before = _num_started()
    process = start(["tune", "digits", "--output", str(output), "--space", space, "--train.latents", latents,
                     "--train.num-steps", "1000", "--train.checkpoint-every-steps", "20", "--evaluate.num-samples", "40",
                     "--scheduler", "median", "--train.validate-every-steps", "500", "--max-concurrent-trials", "1"])
    try:
        harness.wait_until(lambda: list(output.glob("trainings/*/checkpoints/step-00000020")) != [], process, 240)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 130, text
    assert 1 <= _num_started() - before <= 2, "the one that ran, and one that was to be next"


def _num_started() -> int:
    """Processes that Tune has started for trials in this session's Ray, dead ones too."""
    return sum(actor["ActorClassName"].endswith("ImplicitFunc") for actor in state.actors().values())


@pytest.mark.slow
def test_trials_of_a_lost_node_go_on_elsewhere(latents, tmp_path):
    output = tmp_path / "out"
    outside = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-m", "tests.jobs.tune_nodes", latents, str(output)], env=outside, cwd=ROOT,
                          capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["code"] == 0, seen["log"]
    table = json.loads((output / "results.json").read_text())
    assert [t["status"] for t in table["trials"]] == ["finished"] * 2
    for trial in table["trials"]:
        assert [row["step"] for row in trial["curve"]] == list(range(25, 151, 25))
