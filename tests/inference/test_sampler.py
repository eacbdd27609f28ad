"""Samples are pure functions of (checkpoint, sampling config, seed + i); chunks of them become metrics."""

import dataclasses
import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from mdt_ray import storage
from mdt_ray.config import EvaluateConfig, SamplingConfig, VaeConfig
from mdt_ray.data import images, listings, readers, sources
from mdt_ray.data.vae import Vae, load_vae
from mdt_ray.evaluation import chunks, results
from mdt_ray.evaluation.small import load_small_features
from mdt_ray.inference.sampler import Networks, Sampler, draw_latents, labels_of, load_model
from mdt_ray.jobs.evaluate import evaluate, evaluate_many, plan
from tests.inference.conftest import make_checkpoint

METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")
SAMPLING = SamplingConfig(sampler="dpm-solver++", num_sampling_steps=5, cfg_scale=3.0)


def evaluation(checkpoint: str, output, **changes) -> EvaluateConfig:
    base = EvaluateConfig(checkpoint=checkpoint, output=str(output), reference="digits", extractor="digits",
                          sampling=SAMPLING, num_samples=60, chunk_size=20, sample_batch_size=7, labels="random",
                          keep_images=60)
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++"])
def test_an_image_does_not_depend_on_its_batch(checkpoint, sampler):
    drawer = Sampler(checkpoint, dataclasses.replace(SAMPLING, sampler=sampler))
    labels = labels_of(0, 8, 10, "random", seed=5)
    together = drawer.draw(0, labels, seed=5).int()
    assert together.float().std() > 1, "the samples must differ for this to mean anything"
    for size in (1, 3):
        parts = [drawer.draw(first, labels[first:first + size], seed=5) for first in range(0, 8, size)]
        assert (torch.cat(parts).int() - together).abs().max() <= 1


def test_seed_plus_index_names_the_image(checkpoint):
    drawer = Sampler(checkpoint, SAMPLING)
    labels = torch.zeros(2, dtype=torch.long)
    a, b = drawer.draw(3, labels, seed=10), drawer.draw(0, labels, seed=13)
    assert (a.int() - b.int()).abs().max() <= 1
    assert not torch.equal(a, drawer.draw(0, labels, seed=0))
    for kind in ("random", "balanced"):
        assert torch.equal(labels_of(3, 9, 10, kind, seed=10), labels_of(0, 6, 10, kind, seed=13))


def test_labels():
    assert torch.bincount(labels_of(0, 1000, 10, "balanced", 0)).tolist() == [100] * 10
    random = labels_of(0, 5000, 10, "random", 0)
    assert torch.bincount(random, minlength=10).min() > 400
    assert torch.equal(random[40:50], labels_of(40, 50, 10, "random", 0))


@pytest.mark.parametrize("changes", [{}, {"guide": True}])
def test_weights_cast_once_draw_what_autocast_draws(checkpoint, changes):
    sampling = dataclasses.replace(SAMPLING, guide=checkpoint if changes else "", weights="model")
    labels = labels_of(0, 6, 10, "random", seed=5)
    networks = Sampler(checkpoint, sampling, autocast_dtype=torch.bfloat16).networks
    assert networks.model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert networks.model.pos_embed.dtype == networks.model.y_embedder.embedding_table.weight.dtype == torch.float32
    guide = load_model(checkpoint, "ema") if changes else None
    uncast = Networks(load_model(checkpoint, "model"), guide, networks.facts, torch.device("cpu"), torch.bfloat16)
    found, expected = (draw_latents(n, sampling, 0, labels, seed=5) for n in (networks, uncast))
    assert found.std() > 0.1
    assert torch.equal(found, expected)
    assert not torch.equal(found, draw_latents(Sampler(checkpoint, sampling).networks, sampling, 0, labels, seed=5))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on CPUs")
@pytest.mark.filterwarnings("default")  # PyTorch's compiler warns of itself in many places
def test_compiled_blocks_draw_the_same_images(checkpoint, tmp_path):
    """In chunks of 20 by 7 images: compiled for 7 and for 6, each with as many unconditional ones, and never again."""
    torch._dynamo.reset()
    counters.clear()
    images = {}
    for compiled in (False, True):
        assert counters["stats"]["unique_graphs"] == 0
        config = evaluation(checkpoint, tmp_path / str(compiled), num_samples=40, compile=compiled)
        evaluate_many([config], pool=False)
        images[compiled] = chunks.kept_images(plan(config).sample_uris, 40)[0].astype(int)
    assert counters["stats"]["unique_graphs"] == 2
    assert images[False].std() > 1
    assert abs(images[True] - images[False]).max() <= 1
    torch._dynamo.reset()


def test_decoding_truncates_or_rounds():
    vae = load_vae(VaeConfig(path="digits"))
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    truncated, rounded = (vae.decode(latents, round_pixels=r).int() for r in (False, True))
    assert set((rounded - truncated).unique().tolist()) == {0, 1}


def test_metrics_do_not_depend_on_the_chunk_plan(checkpoint, tmp_path):
    results = [evaluate_many([evaluation(checkpoint, tmp_path / str(size), chunk_size=size)], pool=False)[0]["metrics"]
               for size in (20, 33)]
    assert set(results[0]) == {f"{m}_digits_60" for m in (*METRICS, "label_accuracy")}
    for name, value in results[0].items():
        assert results[1][name] == pytest.approx(value, rel=1e-3), name


def test_guides_and_intervals(checkpoint, tmp_path):
    """The samples change with both, and where the guide is the model itself they are its unguided ones."""
    other = make_checkpoint(tmp_path / "other", hidden_size=16)
    labels = labels_of(0, 6, 10, "random", seed=5)

    def draw(**changes) -> torch.Tensor:
        return Sampler(checkpoint, dataclasses.replace(SAMPLING, **changes)).draw(0, labels, seed=5).int()

    plain, unguided = draw(), draw(cfg_scale=1.0)
    assert (draw(guide=checkpoint) - unguided).abs().max() <= 1
    differing = {"none": plain, "interval": draw(cfg_interval=(0, 500)), "guide": draw(guide=other), "unguided": unguided}
    assert len({tuple(value.flatten().tolist()) for value in differing.values()}) == 4
    assert torch.equal(draw(cfg_interval=(0, 999)), plain)
    unconditional = make_checkpoint(tmp_path / "unconditional", num_classes=0)
    with pytest.raises(ValueError, match="its num_classes is 0, the model's 10; a guide must have been trained on the same"):
        draw(guide=unconditional)
    with pytest.raises(ValueError, match=r"sampling.cfg_interval = \(5, 1000\): must be two timesteps, the smaller first"):
        dataclasses.replace(SAMPLING, cfg_interval=(5, 1000))
    with pytest.raises(ValueError, match="has no effect with cfg_scale = 1"):
        plan(evaluation(checkpoint, tmp_path, sampling=dataclasses.replace(SAMPLING, guide=other, cfg_scale=1.0)))


def test_an_evaluation_names_its_guide(checkpoint, tmp_path):
    other = make_checkpoint(tmp_path / "other", hidden_size=16)
    guides = [dataclasses.replace(SAMPLING, guide=uri) for uri in (other, str(tmp_path / "other"))]
    plans = [plan(evaluation(checkpoint, tmp_path / "a", sampling=sampling)) for sampling in (SAMPLING, *guides)]
    names = [p.run["name"] for p in plans]
    assert names[0] != names[1] == names[2]
    assert plans[2].config.sampling.guide == other
    found = evaluate_many([evaluation(checkpoint, tmp_path / "b", sampling=guides[1], num_samples=20)], pool=False)[0]
    assert found["guide"] == {"uri": other, "hash": plans[1].inputs["guide"]}


def test_images_that_cannot_be_judged_are_refused(checkpoint, tmp_path):
    """A sampler that draws one grey image again and again."""
    def grey(self, latents, round_pixels=False) -> torch.Tensor:
        return torch.full((len(latents), 3, 32, 32), 7, dtype=torch.uint8)

    with mock.patch.object(Vae, "decode", grey), pytest.raises(ValueError, match="these images give no metrics:") as error:
        evaluate_many([evaluation(checkpoint, tmp_path)], pool=False)
    copies, flat = str(error.value).splitlines()[1:]
    assert copies.startswith("  59 of 60 images are copies of others")
    assert flat.startswith("  60 of 60 images have one colour only")
    assert not (tmp_path / "metrics.json").exists()


def test_an_unconditional_model_is_evaluated_without_labels(tmp_path):
    unconditional = make_checkpoint(tmp_path / "checkpoint", num_classes=0)
    sampling = dataclasses.replace(SAMPLING, cfg_scale=1.0)
    metrics = evaluate_many([evaluation(unconditional, tmp_path / "a", sampling=sampling)], pool=False)[0]["metrics"]
    assert set(metrics) == {f"{m}_digits_60" for m in METRICS}
    with pytest.raises(ValueError, match="the model is unconditional; use cfg_scale 1"):
        Sampler(unconditional, SAMPLING)


def test_a_finished_evaluation_is_read_and_a_missing_chunk_made_again(checkpoint, tmp_path):
    config = evaluation(checkpoint, tmp_path)
    first = evaluate_many([config], pool=False)[0]
    uris = plan(config).sample_uris
    before = [storage.read_bytes(uri) for uri in uris]
    storage.remove(storage.join(str(tmp_path), "metrics.json"))
    storage.remove(uris[1])
    again = evaluate_many([config], pool=False)[0]
    assert [storage.read_bytes(uri) for uri in uris] == before
    assert again["metrics"] == first["metrics"]
    assert evaluate(config) == again  # without Ray: nothing is left to do


def test_real_images_score_as_themselves():
    source = sources.open_source("digits")
    piece = next(readers.read_pieces(source.folder, source.kind, listings.list_images(source).table, 600))
    pictures, labels = images.decode_piece(piece, 32).images, np.array(piece.labels, dtype=np.int64)
    real = chunks.measure(load_small_features(), pictures, labels, np.arange(10))
    assert np.array_equal(real.images, pictures[:10])
    summary = results.summarise([real])
    metrics, intervals = results.compare(summary, summary.statistics, summary.features, "digits")
    assert metrics["fid_digits_600"] == pytest.approx(0, abs=1e-6)
    assert metrics["precision_digits_600"] == metrics["recall_digits_600"] == 1
    assert metrics["label_accuracy_digits_600"] > 0.98
    assert 6 < metrics["is_digits_600"] <= 10
    low, high = intervals["kid_digits_600"]
    assert low < 0 < high


def test_metrics_json_says_what_identifies_the_numbers(checkpoint, tmp_path):
    evaluate_many([evaluation(checkpoint, tmp_path)], pool=False)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["sampling"]["sampler"] == "dpm-solver++"
    assert found["checkpoint"]["hash"]
    assert (found["num_samples"], found["seed"], found["labels"], found["extractor"]) == (60, 0, "random", "digits")
    assert found["reference"]["num_images"] == 1797
    assert found["versions"]["torch"]


# Bad input


def test_another_checkpoint_in_the_same_output_is_refused(checkpoint, tmp_path):
    evaluate_many([evaluation(checkpoint, tmp_path)], pool=False)
    with pytest.raises(ValueError, match=r"holds another run(.|\n)*sampling.cfg_scale: 3.0 -> 1.0"):
        evaluate_many([evaluation(checkpoint, tmp_path, sampling=dataclasses.replace(SAMPLING, cfg_scale=1.0))], pool=False)


def test_a_changed_vae_is_refused(checkpoint, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    facts = json.loads((copy / "state.json").read_text())
    facts["vae"]["weights_hash"] = "other"
    (copy / "state.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="not the weights that the latents were made with"):
        Sampler(str(copy), SAMPLING)


def test_an_extractor_refuses_images_of_another_size():
    with pytest.raises(ValueError, match="reads 32x32 images, but these are 256x256"):
        chunks.check_extractor("digits", 256)


def test_kept_images_come_in_index_order(checkpoint, tmp_path):
    config = evaluation(checkpoint, tmp_path, keep_images=30)
    evaluate_many([config], pool=False)
    uris = plan(config).sample_uris
    pictures, labels = chunks.kept_images(uris, 25)
    assert pictures.shape == (25, 32, 32, 3)
    assert np.array_equal(labels, labels_of(0, 25, 10, "random", 0).numpy())
    assert len(chunks.kept_images(uris, 99)[0]) == 30


def test_a_damaged_checkpoint_that_was_named_is_refused(checkpoint, tmp_path):
    """Nothing else would notice: the file is a whole one of safetensors."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "ema" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    load_model(str(tmp_path), "model")
    with pytest.raises(ValueError, match=r"checkpoint .*: ema/diffusion_pytorch_model\.\w+ does not have its checksum"):
        load_model(str(tmp_path), "ema")
