"""Pictures filled in from the command line's job: the hidden part changes, the rest stays, and it is the pipeline's work."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from mdt_ray.config import InpaintConfig, SamplingConfig
from mdt_ray.jobs.inpaint import inpaint
from tests.inference.conftest import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), kind="mdt_v2")


@pytest.fixture
def config(checkpoint, tmp_path) -> InpaintConfig:
    return InpaintConfig(checkpoint=checkpoint, images="digits", output=str(tmp_path / "out"), mask_ratio=0.5, num_images=3,
                         sampling=SamplingConfig(sampler="ddim", num_sampling_steps=3))


def drawn(config) -> list[np.ndarray]:
    names = [f"{config.output}/images/{i:06d}.png" for i in range(config.num_images)]
    return [np.asarray(Image.open(name)).astype(int) for name in names]


def test_a_ratio_of_tokens_of_each_picture(config, tmp_path):
    grid = inpaint(config)
    first = drawn(config)
    assert Image.open(grid).size[0] > 3 * 32
    assert inpaint(config) == grid
    other = dataclasses.replace(config, output=str(tmp_path / "other"), seed=1)
    inpaint(other)
    # Picture i of seed 1 has the mask and noise of picture i + 1 of seed 0, but is another picture.
    assert all(not np.array_equal(a, b) for a, b in zip(first, drawn(other), strict=True))
    with pytest.raises(ValueError, match="holds another run"):
        inpaint(dataclasses.replace(config, mask_ratio=0.25))


def test_a_mask_picture_and_a_class(config, tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255  # the right half, at another size
    Image.fromarray(mask).save(tmp_path / "mask.png")
    config = dataclasses.replace(config, mask_ratio=None, mask=str(tmp_path / "mask.png"))
    inpaint(config)
    labelled = dataclasses.replace(config, classes=("3",), output=str(tmp_path / "labelled"))
    inpaint(labelled)
    for plain, as_three in zip(drawn(config), drawn(labelled), strict=True):
        left, right = (abs(plain - as_three)[:, part].mean() for part in (slice(0, 8), slice(24, 32)))
        assert right > 2 * left  # the VAE sees across the edge, but not far


def test_what_cannot_be_done_is_said(config, tmp_path):
    def check(match: str, **changes) -> None:
        with pytest.raises(ValueError, match=match):
            inpaint(dataclasses.replace(config, **changes))

    check("mask_image, mask_ratio: give one of the two", mask_ratio=None)
    check("give it or a mask, not both", mask="x.png")
    check("must be none, one, or one for each of num_images = 3", classes=("1", "2"))
    check("unknown class 'digt 3'", classes=("digt 3",))
    check("inpainting has no guide", sampling=SamplingConfig(cfg_interval=(0, 5)))
    (tmp_path / "mask.png").write_text("no picture")
    mask = str(tmp_path / "mask.png")
    check("not a readable image .*; give a picture, white where to fill in", mask_ratio=None, mask=mask)
    assert not (tmp_path / "out").exists()
