"""Pictures from a checkpoint: the images that `evaluate` draws, as PNGs, a grid and an npz."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from mdt_ray.config import EvaluateConfig, SampleConfig, SamplingConfig
from mdt_ray.evaluation import chunks
from mdt_ray.jobs.evaluate import evaluate_many
from mdt_ray.jobs.sample import sample
from tests.inference.conftest import make_checkpoint

SAMPLING = SamplingConfig(sampler="dpm-solver++", num_sampling_steps=4, cfg_scale=2.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def config(checkpoint, tmp_path) -> SampleConfig:
    return SampleConfig(checkpoint=checkpoint, output=str(tmp_path / "out"), num_samples=10, sampling=SAMPLING, seed=3)


def arrays(output) -> tuple[np.ndarray, np.ndarray]:
    with np.load(f"{output}/samples.npz") as file:
        return file["arr_0"], file["arr_1"]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on CPUs"),
    pytest.mark.filterwarnings("default")])])  # PyTorch's compiler warns of itself in many places
def test_they_are_the_images_of_an_evaluation(config, checkpoint, tmp_path, compiled):
    sample(dataclasses.replace(config, batch_size=4, compile=compiled))
    pictures, labels = arrays(config.output)
    judged = EvaluateConfig(checkpoint=checkpoint, output=str(tmp_path / "judged"), reference="digits", sampling=SAMPLING,
                            extractor="digits", num_samples=10, chunk_size=10, sample_batch_size=10, keep_images=10, seed=3)
    evaluate_many([judged], pool=False)
    expected, their_labels = chunks.kept_images([str(tmp_path / "judged" / "chunks" / "00000000.safetensors")], 10)
    assert labels.tolist() == their_labels.tolist()
    assert abs(pictures.astype(int) - expected).max() <= 1
    assert (pictures.dtype, pictures.shape) == (np.uint8, (10, 32, 32, 3))
    files = sorted((tmp_path / "out" / "images").iterdir())
    assert [f.name for f in files] == [f"{i:06d}-{label}.png" for i, label in enumerate(labels)]
    assert np.array_equal(np.asarray(Image.open(files[7])), pictures[7])


def test_named_classes_get_a_row_each(config, tmp_path):
    grid = sample(dataclasses.replace(config, classes=("digit 7", "2"), num_samples=3))
    assert arrays(config.output)[1].tolist() == [7, 7, 7, 2, 2, 2]
    width, height = Image.open(grid).size
    assert width > 3 * 40  # three pictures and the names
    assert height > 2 * 40
    with pytest.raises(ValueError, match="unknown class 'digt 7'"):
        sample(dataclasses.replace(config, classes=("digt 7",), output=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_the_same_command_again_does_nothing_and_another_is_refused(config, tmp_path):
    sample(config)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert sample(dataclasses.replace(config, batch_size=3)) == f"{config.output}/grid.png"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")} == times
    with pytest.raises(ValueError, match="holds another run"):
        sample(dataclasses.replace(config, seed=4))


def test_an_unconditional_model(tmp_path):
    unconditional = make_checkpoint(tmp_path / "checkpoint", num_classes=0)
    config = SampleConfig(checkpoint=unconditional, output=str(tmp_path / "out"), num_samples=2,
                          sampling=dataclasses.replace(SAMPLING, cfg_scale=1.0))
    sample(config)
    assert arrays(config.output)[1].tolist() == [-1, -1]
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["000000.png", "000001.png"]
    with pytest.raises(ValueError, match="the model is unconditional; leave them out"):
        sample(dataclasses.replace(config, classes=("1",)))
