"""Evaluations of checkpoints and of pictures made elsewhere, against images and statistics; ranges of seeds; sweeps."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from mdt_ray import cli, storage
from mdt_ray.config import EvaluateConfig, ReferenceConfig, SamplingConfig, SweepConfig, WorkersConfig
from mdt_ray.data import arrays, images, listings, readers, sources
from mdt_ray.evaluation import chunks, metrics, results
from mdt_ray.evaluation.inception import Inception
from mdt_ray.evaluation.reference import read_reference
from mdt_ray.evaluation.small import load_small_features
from mdt_ray.jobs import plan_evaluate
from mdt_ray.jobs.evaluate import evaluate, evaluate_many, plan, resolve
from mdt_ray.jobs.reference import reference
from mdt_ray.jobs.sweep import settings_of, sweep
from tests import harness
from tests.inference.conftest import make_checkpoint

SAMPLING = SamplingConfig(sampler="dpm-solver++", num_sampling_steps=4, cfg_scale=2.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The embedded pictures (N, 32, 32, 3) and their labels."""
    source = sources.open_source("digits")
    piece = next(readers.read_pieces(source.folder, source.kind, listings.list_images(source).table, 10_000))
    return images.decode_piece(piece, 32).images, np.array(piece.labels, dtype=np.int64)


def saved(path: Path, pictures: np.ndarray, **others: np.ndarray) -> str:
    np.savez(path, arr_0=pictures, **others)
    return str(path)


def judged(output: Path, **changes) -> dict:
    config = EvaluateConfig(output=str(output), extractor="digits", chunk_size=40, keep_images=10)
    return evaluate_many([dataclasses.replace(config, **changes)], pool=False)[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory, digits) -> dict[str, str]:
    """Pictures in the ways that other systems leave them: the first 100 as samples, the rest as the reference."""
    folder = tmp_path_factory.mktemp("pictures")
    pictures, labels = digits
    for i, picture in enumerate(pictures[:100]):
        (folder / "flat").mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / "flat" / f"{i:05d}.png")
    return {"npz": saved(folder / "samples.npz", pictures[:100], arr_1=labels[:100]),
            "compressed": str(folder / "compressed.npz"), "flat": str(folder / "flat"),
            "reference": saved(folder / "reference_batch.npz", pictures[100:400])} | (
        np.savez_compressed(folder / "compressed.npz", arr_0=pictures[:100]) or {})


def test_pictures_made_elsewhere_give_the_metrics_of_their_features(files, digits, tmp_path):
    """All ways to hand them in agree, and with the metrics computed plainly."""
    found = {name: judged(tmp_path / name, samples=files[name], reference=files["reference"], num_samples=100)
             for name in ("npz", "compressed", "flat")}
    network = load_small_features()
    made, real = (chunks.measure(network, part, np.full(len(part), -1), np.arange(0))
                  for part in (digits[0][:100], digits[0][100:400]))
    mean, sigma = (lambda x: x.astype(np.float64).mean(0)), (lambda x: np.cov(x.astype(np.float64), rowvar=False))
    expected = {
        "fid_digits_100": metrics.frechet_distance(mean(made.pool), sigma(made.pool), mean(real.pool), sigma(real.pool)),
        "sfid_digits_100": metrics.frechet_distance(*(f(x.spatial) for x in (made, real) for f in (mean, sigma))),
        "is_digits_100": metrics.inception_score(results.softmax(made.logits)),
        **dict(zip(("precision_digits_100", "recall_digits_100"), metrics.precision_recall(real.pool, made.pool),
                   strict=True)),
        "kid_digits_100": metrics.kernel_distance(real.pool, made.pool, block_size=10).value}
    for name, result in found.items():
        values = dict(result["metrics"])
        accuracy = values.pop("label_accuracy_digits_100", None)
        assert (accuracy is not None) == (name == "npz"), "labels come with arr_1 only"
        assert values == pytest.approx(expected, rel=1e-6, abs=1e-9), name
        assert result["checkpoint"] is None
        assert result["sampling"] is None
    assert found["npz"]["samples"]["hash"] != found["flat"]["samples"]["hash"]


def test_statistics_stand_in_for_the_images(files, digits, tmp_path):
    """`reference` builds what the official files hold; with it the numbers are those of the images themselves."""
    made = reference(ReferenceConfig(source=files["reference"], output=str(tmp_path / "statistics"), image_size=32,
                                     extractor="digits", num_images=60, chunk_size=70), pool=False)
    with np.load(made, allow_pickle=False) as file:
        assert file["arr_0"].shape == (60, 32, 32, 3)
        assert np.array_equal(file["arr_0"], digits[0][100:400][chunks.spread(300, 60)])
        assert set(file) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "facts"}
    assert not (tmp_path / "statistics" / "chunks").exists()
    given = {"samples": files["npz"], "num_samples": 100}
    by_statistics = judged(tmp_path / "a", reference=str(tmp_path / "statistics"), **given)
    assert by_statistics["reference"]["source"] == made
    by_images = judged(tmp_path / "b", reference=files["reference"], **given)
    for name in ("fid_digits_100", "sfid_digits_100", "is_digits_100"):
        assert by_statistics["metrics"][name] == pytest.approx(by_images["metrics"][name], rel=1e-9), name
    real = chunks.measure(load_small_features(), digits[0][100:400][chunks.spread(300, 60)], np.zeros(60), np.arange(0))
    own = chunks.measure(load_small_features(), digits[0][:100], np.zeros(100), np.arange(0))
    assert (by_statistics["metrics"]["precision_digits_100"], by_statistics["metrics"]["recall_digits_100"]) == \
        metrics.precision_recall(real.pool, own.pool)
    assert by_statistics["reference"]["num_images"] == 300
    assert "fid_digits_between_halves" not in by_statistics["reference"]
    assert reference(ReferenceConfig(source=files["reference"], output=str(tmp_path / "statistics"), image_size=32,
                                     extractor="digits", num_images=60, chunk_size=70)) == made, "nothing is left to do"


@pytest.mark.slow
def test_an_official_file_drops_in(files, digits, tmp_path):
    """Keys and shapes of ADM's files; features of Inception with random weights stand for the published ones."""
    torch.manual_seed(0)
    network = Inception()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    real = chunks.measure(network, digits[0][100:124], np.full(24, -1), np.arange(0))
    sigma = [np.cov(x.astype(np.float64), rowvar=False) for x in (real.pool, real.spatial)]
    official = saved(tmp_path / "VIRTUAL_32.npz", digits[0][100:124], mu=real.pool.mean(0), sigma=sigma[0],
                     mu_s=real.spatial.mean(0), sigma_s=sigma[1])
    small = saved(tmp_path / "small.npz", digits[0][:12])
    found = judged(tmp_path / "out", samples=small, reference=official, num_samples=12, extractor="inception",
                   extractor_weights=str(tmp_path / "weights.pth"))
    assert set(found["metrics"]) == {f"{name}_12" for name in ("fid", "sfid", "is", "precision", "recall", "kid")}
    made = chunks.measure(network, digits[0][:12], np.full(12, -1), np.arange(0))
    pool = made.pool.astype(np.float64)
    expected = metrics.frechet_distance(pool.mean(0), np.cov(pool, rowvar=False), real.pool.mean(0).astype(np.float64),
                                        sigma[0])
    assert found["metrics"]["fid_12"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="extractor is 'inception', but the samples' is 'digits'"):
        judged(tmp_path / "other", samples=small, reference=official, num_samples=12)


def test_dinov2_gives_what_it_can_under_names_of_its_own(files, tmp_path):
    """Neither a spatial map nor classes: no sFID and no IS. A small network stands for the published one."""
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, mlp_ratio=2, image_size=28,
                             initializer_range=0.3)).save_pretrained(tmp_path / "dinov2")
    small, real = (saved(tmp_path / f"{name}.npz", arrays.read_images(arrays.open_npz(files[name]), 0, 20))
                   for name in ("npz", "reference"))
    found = judged(tmp_path / "out", samples=small, reference=real, num_samples=20, extractor="dinov2",
                   extractor_weights=str(tmp_path / "dinov2"))
    assert set(found["metrics"]) == {f"{name}_dinov2_20" for name in ("fd", "precision", "recall", "kd")}
    assert found["transform"] == "bicubic-antialias-224"


def test_distances_may_be_those_of_adm(files, digits, tmp_path):
    given = {"samples": files["npz"], "reference": files["reference"], "num_samples": 100}
    found = judged(tmp_path, adm_float16=True, **given)["metrics"]
    network = load_small_features()
    made, real = (chunks.measure(network, part, np.zeros(len(part)), np.arange(0)).pool
                  for part in (digits[0][:100], digits[0][100:400]))
    assert (found["precision_digits_100"], found["recall_digits_100"]) == \
        metrics.precision_recall(real, made, adm_float16=True)


def test_the_plan_measures_all_parts(checkpoint, files, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_evaluate, "MEASURE_SECONDS", 0.01)
    config = EvaluateConfig(checkpoint=checkpoint, output=str(tmp_path / "out"), reference="digits", extractor="digits",
                            sampling=dataclasses.replace(SAMPLING, cfg_interval=(0, 500)), num_samples=100, chunk_size=40,
                            sample_batch_size=4, num_seed_ranges=2)
    lines = plan_evaluate.plan_evaluate(config).splitlines()
    assert lines[0].split(None, 1)[1] == "200 images in 2 ranges of seeds, 6 chunks"
    assert re.search(r"drawing [\d.,]+ images/s, decoding [\d.,]+ images/s, measuring [\d.,]+ images/s", lines[3])
    assert re.search(r"about \d+ s", lines[4])
    given = dataclasses.replace(config, checkpoint="", samples=files["npz"], num_seed_ranges=1)
    assert "drawing" not in plan_evaluate.plan_evaluate(given)
    assert not (tmp_path / "out").exists()


def test_all_settings_of_a_sweep_are_of_one_checkpoint_while_training_goes_on(checkpoint, tmp_path):
    """From a store, it would also be read again for each."""
    output, known = tmp_path / "train", {}
    config = EvaluateConfig(checkpoint=str(output), output=str(tmp_path / "out"), reference="digits", extractor="digits",
                            sampling=SAMPLING, num_samples=40)
    for step in (1, 2):
        newest = shutil.copytree(checkpoint, output / "checkpoints" / f"step-{step:08d}")
        found = plan(config, config.output, known).config.checkpoint
        assert Path(found).name == "step-00000001"
    assert plan(config).config.checkpoint == str(newest)


def test_the_command_line_takes_a_source_and_presets(files, tmp_path):
    settings = cli.parse("reference", [files["reference"], "--output", str(tmp_path), "--image-size", "32"]).settings
    assert (settings.source, settings.image_size) == (files["reference"], 32)
    words = ["digits", "--cfg-scale", "1", "2", "--cfg-interval", "0", "999", "0", "400"]
    settings = cli.parse("evaluate sweep", words).settings
    assert (settings.cfg_scale, settings.cfg_interval) == ((1.0, 2.0), ((0, 999), (0, 400)))
    assert settings.evaluate.extractor == "digits"
    assert cli.parse("plan evaluate", ["imagenet256-s-2"]).settings.num_samples == 50_000


def test_ranges_of_seeds_give_mean_and_spread(checkpoint, tmp_path):
    shared = {"checkpoint": checkpoint, "reference": "digits", "sampling": SAMPLING, "num_samples": 40, "seed": 5}
    found = judged(tmp_path / "ranges", num_seed_ranges=2, **shared)
    alone = [judged(tmp_path / str(seed), **{**shared, "seed": seed})["metrics"] for seed in (5, 45)]
    name = "fid_digits_40"
    assert found["metrics"][name] == pytest.approx(np.mean([a[name] for a in alone]))
    assert found["ranges"]["min"][name] == min(a[name] for a in alone)
    assert found["ranges"]["std"][name] == pytest.approx(np.std([a[name] for a in alone], ddof=1))
    assert [s["seed"] for s in found["seeds"]] == [5, 45]
    assert sorted(p.name for p in (tmp_path / "ranges").glob("seeds-*")) == ["seeds-45", "seeds-5"]


def test_what_needs_no_new_images_is_computed_again(checkpoint, tmp_path):
    """Distances in float16 and further ranges of seeds, in a folder that is finished; a damaged chunk is made again."""
    shared = {"checkpoint": checkpoint, "reference": "digits", "sampling": SAMPLING, "num_samples": 40}
    first = judged(tmp_path, num_seed_ranges=2, **shared)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seeds-*/chunks/*")}
    exact = judged(tmp_path, adm_float16=True, num_seed_ranges=2, **shared)
    assert exact["adm_float16"]
    more = judged(tmp_path, num_seed_ranges=3, **shared)
    assert [s["metrics"] for s in more["seeds"]][:2] == [s["metrics"] for s in first["seeds"]]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    (emptied,) = (tmp_path / "seeds-40" / "chunks").iterdir()
    content = emptied.read_bytes()
    emptied.write_bytes(b"")
    (tmp_path / "seeds-40" / "metrics.json").unlink()
    assert judged(tmp_path, num_seed_ranges=3, **shared)["metrics"] == more["metrics"]
    assert emptied.read_bytes() == content


def test_class_folders_are_measured_in_mixed_order(digits, files, tmp_path):
    """As they lie they would be sorted by class, and the first hundred would be zeros."""
    pictures, labels = digits
    for i in range(600):
        (tmp_path / "classes" / str(labels[i])).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures[i]).save(tmp_path / "classes" / str(labels[i]) / f"{i:05d}.png")
    found = judged(tmp_path / "out", samples=str(tmp_path / "classes"), reference=files["reference"], num_samples=100)
    assert found["metrics"]["is_digits_100"] > 5
    assert "label_accuracy_digits_100" not in found["metrics"]


def test_a_row_says_what_the_numbers_are_of(checkpoint, tmp_path):
    found = judged(tmp_path, checkpoint=checkpoint, reference="digits", sampling=SAMPLING, num_samples=40)
    (row,) = pq.read_table(tmp_path / "metrics.parquet").to_pylist()
    assert row["metrics.fid_digits_40"] == found["metrics"]["fid_digits_40"]
    assert row["checkpoint.hash"] == found["checkpoint"]["hash"]
    for key in ("sampling.sampler", "sampling.num_sampling_steps", "sampling.cfg_scale", "sampling.weights", "labels",
                "seed", "num_samples", "vae.weights_hash", "precision", "extractor", "extractor_hash", "reference.hash"):
        assert row[key] is not None, key
    low, high = json.loads(row["intervals.kid_digits_40"])
    assert low < row["metrics.kid_digits_40"] < high


def test_names_carry_the_number_of_samples():
    assert [results.metric_name("fid", extractor, count) for extractor, count in (
        ("inception", 50_000), ("inception", 5000), ("inception", 1999), ("dinov2", 50_000), ("digits", 300))] == [
        "fid_50k", "fid_5k", "fid_1999", "fd_dinov2_50k", "fid_digits_300"]


# Through Ray


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    """An evaluation of 72 images by one sampler in this process, in batches of 64."""
    folder = tmp_path_factory.mktemp("alone")
    return evaluated(checkpoint, folder, 1, 64)


def evaluated(checkpoint, folder, workers, batch):
    """What the evaluation found, its chunks' files, and its pictures with labels. One sampler works in this process."""
    config = EvaluateConfig(checkpoint=checkpoint, output=str(folder / f"{workers}-{batch}"), reference="digits",
                            extractor="digits", sampling=SAMPLING, num_samples=72, chunk_size=24, sample_batch_size=batch,
                            keep_images=72, workers=WorkersConfig(num_workers=workers, cpus_per_worker=0.5))
    found = evaluate(config) if workers > 1 else evaluate_many([config], pool=False)[0]
    return found, harness.files(folder, f"{workers}-{batch}/chunks/*"), chunks.kept_images(plan(config).sample_uris, 72)


@pytest.mark.ray
@pytest.mark.parametrize(("workers", "batch"), [
    (1, 1), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 64), (3, 7)))])
def test_workers_and_batches_change_no_image(checkpoint, alone, ray_session, tmp_path, workers, batch):
    """Equal labels, images within a grey level; of equal plans, equal bytes."""
    expected, expected_files, (pictures, labels) = alone
    found, files, (others, their_labels) = evaluated(checkpoint, tmp_path, workers, batch)
    assert pictures.std() > 1
    assert np.array_equal(labels, their_labels)
    assert abs(others.astype(int) - pictures).max() <= 1
    if batch == 64:
        assert found["metrics"] == expected["metrics"]
        assert [data for _, data in sorted(files.items())] == [data for _, data in sorted(expected_files.items())]
    if workers > 1:
        assert 0 < found["samplers"]["busy_share"] <= 1


@pytest.mark.ray
@pytest.mark.slow
def test_training_images_near_the_samples_are_shown(checkpoint, ray_session, tmp_path):
    """Asked for later, too: the images are not drawn again."""
    harness.run_here(["precompute", "digits", "--output", f"{tmp_path}/latents", "--workers.num-workers", "1",
                      "--validation-share", "0.1"])
    shared = {"checkpoint": checkpoint, "reference": "digits", "sampling": SAMPLING, "num_samples": 40}
    before = judged(tmp_path / "out", **shared)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "chunks").iterdir()}
    found = judged(tmp_path / "out", latents=f"{tmp_path}/latents", **shared)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert before["metrics"] == found["metrics"]
    assert found["memorisation"]["num_samples"] == 10, "as many as were kept"
    assert found["memorisation"]["least_distance"] > 0
    assert (tmp_path / "out" / "neighbours.png").read_bytes().startswith(b"\x89PNG")
    last = harness.run_here(["evaluate", "--config", f"{tmp_path}/out/run.json"])
    assert re.search(r"\nmemorised: \d+\.\d% of 10 samples are nearer .* 1\.\d% of unseen images are; see .*png", last)


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_draws_its_frontier(checkpoint, ray_session, tmp_path):
    config = SweepConfig(output=str(tmp_path), cfg_scale=(1.0, 2.0), cfg_power=(0.0, 2.0), cfg_interval=((0, 999), (0, 400)),
                         evaluate=EvaluateConfig(checkpoint=checkpoint, reference="digits", extractor="digits",
                                                 sampling=SAMPLING, num_samples=40, chunk_size=40, keep_images=0))
    assert len(settings_of(config)) == 5, "without guidance, its schedule makes no difference"
    found = sweep(config)
    fids = [trial["metrics"]["fid_digits_40"] for trial in found["trials"]]
    assert fids == sorted(fids)
    assert len(set(fids)) == 5
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.glob("reference-*"))) == 1, "the real images are measured once"
    best = cli.parse("evaluate", ["--config", str(tmp_path / "best.json")]).settings
    assert (best.sampling.cfg_scale, best.num_samples) == (found["trials"][0]["cfg_scale"], 50_000)
    assert sweep(config) == found


@pytest.mark.ray
@pytest.mark.slow
def test_a_reference_is_built_by_the_pool(ray_session, tmp_path):
    settings = ReferenceConfig(source="digits", output=str(tmp_path / "a"), image_size=32, extractor="digits",
                               workers=WorkersConfig(num_workers=2, cpus_per_worker=0.5))
    made = reference(settings)
    alone = reference(dataclasses.replace(settings, output=str(tmp_path / "b")), pool=False)
    assert storage.read_bytes(made) == storage.read_bytes(alone)
    assert read_reference(made).facts["num_images"] == 1797
    assert arrays.open_npz(made).num_images == 1797


# Bad input


def test_what_does_not_fit_is_refused_before_anything_is_done(files, digits, checkpoint, tmp_path):
    out = tmp_path / "out"
    other_size = saved(tmp_path / "other.npz", np.zeros((10, 16, 16, 3), np.uint8))
    oblong = saved(tmp_path / "oblong.npz", np.zeros((10, 32, 16, 3), np.uint8))
    shared = {"samples": files["npz"], "reference": files["reference"], "num_samples": 100}
    for changes, message in (
            ({"num_samples": 5000}, "num_samples = 5000: .* holds 100 pictures; use --num-samples 100"),
            ({"reference": other_size}, "has pictures of 16 pixels, but the samples have 32"),
            ({"samples": other_size, "num_samples": 10}, "reads 32x32 images, but these are 16x16"),
            ({"samples": oblong, "num_samples": 10}, "has pictures of 16 x 32 pixels, but they must be square"),
            ({"samples": ""}, "checkpoint = '': not given; name one, or pictures by --samples"),
            ({"checkpoint": checkpoint}, "have no use for a checkpoint"),
            ({"reference": ""}, "reference = '': not given; name real images, or statistics of them"),
            ({"num_samples": 3}, "num_samples = 3: must be at least 4"),
            ({"extractor": "inception", "extractor_weights": str(tmp_path / "none.pth")}, "fetch them with: .*curl")):
        with pytest.raises(ValueError, match=message):
            judged(out, **{**shared, **changes})
    assert not out.exists()


def test_latents_that_are_not_there_are_noticed_before_anything_is_drawn(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"none: no manifest.json"):
        judged(tmp_path / "out", checkpoint=checkpoint, reference="digits", sampling=SAMPLING, num_samples=40,
               latents=str(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


def test_the_hash_of_a_checkpoint_is_that_of_its_model(checkpoint, tmp_path):
    """Two runs that end with the same weights have other run.json and metrics."""
    copy = tmp_path / "copy" / Path(checkpoint).name
    shutil.copytree(checkpoint, copy)
    checksums = json.loads((copy / "checksums.json").read_text())
    (copy / "checksums.json").write_text(json.dumps(checksums | {"run.json": "0" * 64}))
    other = make_checkpoint(tmp_path / "other", hidden_size=16)
    first, same, differing = (resolve(uri, SAMPLING)[2]["checkpoint"] for uri in (checkpoint, str(copy), other))
    assert first == same != differing
    raw = resolve(checkpoint, dataclasses.replace(SAMPLING, weights="model"))[2]["checkpoint"]
    assert raw != first


def test_a_reference_with_unreadable_pictures_is_refused(files, digits, tmp_path):
    (tmp_path / "real").mkdir()
    for i, picture in enumerate(digits[0][100:140]):
        Image.fromarray(picture).save(tmp_path / "real" / f"{i}.png")
    given = {"samples": files["npz"], "reference": str(tmp_path / "real"), "num_samples": 100}
    assert judged(tmp_path / "whole", **given)["reference"]["num_rejected"] == 0
    (tmp_path / "real" / "7.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="the reference: 1 of 40 pictures could not be read; mend or remove them"):
        judged(tmp_path / "damaged", **given)


def test_pictures_of_several_sizes_are_refused(files, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i, side in enumerate((32, 32, 31, 32)):
        Image.new("RGB", (side, side), (i, 0, 0)).save(folder / f"{i}.png")
    message = "2.png: has 31 x 31 pixels, the first picture 32 x 32; mend or remove it"
    with pytest.raises(ValueError, match=re.escape(message)):
        judged(tmp_path / "out", samples=str(folder), reference=files["reference"], num_samples=4)
