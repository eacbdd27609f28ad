"""Inpainting: known tokens stay, hidden ones are drawn, the side-interpolator is used where it can be."""

import numpy as np
import pytest
import torch
from PIL import Image

from mdt_ray.inference.inpaint import MDTInpaintPipeline
from mdt_ray.inference.pipeline import MDTPipeline
from tests.inference.conftest import make_checkpoint

FEW = {"num_inference_steps": 4, "output_type": "latent"}
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def opened(checkpoint: str) -> MDTInpaintPipeline:
    pipe = MDTInpaintPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes(checkpoint, checkpoint_v2) -> dict[str, MDTInpaintPipeline]:
    return {"mdt_v1": opened(checkpoint), "mdt_v2": opened(checkpoint_v2)}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def left_half() -> Image.Image:
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    return Image.fromarray(mask)


@pytest.mark.parametrize("kind", ["mdt_v1", "mdt_v2"])
@pytest.mark.parametrize("scheduler", ["ddpm", "euler"])
def test_known_tokens_keep_their_latents(pipes, kind, scheduler):
    from diffusers import EulerDiscreteScheduler

    pipe = pipes[kind]
    if scheduler == "euler":
        pipe = MDTInpaintPipeline(pipe.transformer, pipe.vae, EulerDiscreteScheduler.from_config(pipe.scheduler.config))
        pipe.set_progress_bar_config(disable=True)
    out = pipe(IMAGES, left_half(), class_labels=[1, 2], generator=seeded(), **FEW).images
    with torch.no_grad():
        known = pipe.vae.encode(IMAGES * 2 - 1).latent_dist.mean
    torch.testing.assert_close(out[..., 2:], known[..., 2:], atol=1e-4, rtol=1e-4)
    assert (out[..., :2] - known[..., :2]).abs().mean() > 0.05


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_any_mask_ratio(pipes, ratio):
    hidden = pipes["mdt_v2"].hidden_tokens(2, mask_ratio=ratio, generator=seeded())
    assert hidden.sum(1).tolist() == [16 - int(16 * (1 - ratio))] * 2
    assert not torch.equal(hidden[0], hidden[1]) or ratio == 0.1
    images = pipes["mdt_v2"](IMAGES, mask_ratio=ratio, generator=seeded(), num_inference_steps=4).images
    assert [image.size for image in images] == [(32, 32)] * 2


def test_the_side_interpolator_is_used_where_it_can_be(pipes, tmp_path, caplog):
    def draw(pipe, **arguments):
        return pipe(IMAGES, left_half(), generator=seeded(), **FEW, **arguments).images

    pipe, seen = pipes["mdt_v2"], []
    hook = pipe.transformer.sideblocks[0].register_forward_hook(lambda *args: seen.append(1))
    used = draw(pipe)
    assert len(seen) == 4
    assert not torch.allclose(used, draw(pipe, side_interpolator=False))
    assert len(seen) == 4
    draw(pipe, guidance_scale=2.0, class_labels=[1, 2])
    assert len(seen) == 8
    hook.remove()
    v1 = pipes["mdt_v1"]
    asked = draw(v1, side_interpolator=True)
    assert "never sees the noise of hidden tokens" in caplog.text
    assert not torch.allclose(asked, draw(v1))
    dit = opened(make_checkpoint(tmp_path, kind="dit"))
    assert draw(dit).isfinite().all()
    with pytest.raises(ValueError, match="no masked pass"):
        draw(dit, side_interpolator=True)


@torch.no_grad()
def test_a_mask_of_some_pixels_hides_whole_tokens(pipes):
    mask = np.zeros((32, 32, 1), np.float32)
    mask[3, 17] = 1  # one pixel of the token in row 0, column 2
    hidden = pipes["mdt_v1"].hidden_tokens(1, mask_image=mask)
    assert hidden.nonzero().tolist() == [[0, 2]]


def test_bad_masks_are_named(pipes):
    pipe = pipes["mdt_v2"]
    with pytest.raises(ValueError, match="give one of the two"):
        pipe(IMAGES)
    with pytest.raises(ValueError, match=r"hides \[16, 16\] of 16 tokens"):
        pipe(IMAGES, np.ones((32, 32, 1), np.float32))
    with pytest.raises(ValueError, match=r"hides \[0, 0\] of 16 tokens"):
        pipe(IMAGES, np.zeros((32, 32, 1), np.float32))
    unlike = torch.zeros(2, 1, 32, 32)
    unlike[0, :, :8] = unlike[1, :, :16] = 1
    with pytest.raises(ValueError, match=r"hidden tokens = \[4, 8\] of 16: must be as many in every sample"):
        pipe(IMAGES, unlike)
    assert len(pipe(IMAGES, unlike, side_interpolator=False, **FEW).images) == 2
    with pytest.raises(ValueError, match="1 for 2 images"):
        pipe(IMAGES, left_half(), class_labels=[3])
    with pytest.raises(ValueError, match=r"latents has shape \(1, 4, 2, 2\)"):
        pipe(IMAGES[:1, :, :16, :16], left_half())


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_any_mode(pipes, mode):
    picture = Image.fromarray((IMAGES[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)).convert(mode)
    out = pipes["mdt_v2"]([picture, picture], left_half(), num_inference_steps=2).images
    assert len(out) == 2
    masks = [left_half(), torch.ones(32, 32).tril() > 0, np.eye(32, dtype=np.uint8)]
    for mask in masks:
        assert pipes["mdt_v1"].hidden_tokens(1, mask_image=mask).any()
    assert pipes["mdt_v1"].hidden_tokens(2, mask_image=[left_half(), masks[2]]).sum(1).tolist() == [8, 4]


def test_bad_pictures_are_named(pipes):
    pipe = pipes["mdt_v1"]
    with pytest.raises(ValueError, match="image: has dtype uint8"):
        pipe((IMAGES * 255).to(torch.uint8), left_half())
    with pytest.raises(ValueError, match=r"mask_image: 3 of \(32, 32\) pixels: must be one, or one for each of 2"):
        pipe(IMAGES, [left_half()] * 3)
    with pytest.raises(ValueError, match=r"1 of \(64, 64\) pixels"):
        pipe(IMAGES, left_half().resize((64, 64)))


def test_it_is_an_mdt_pipeline(pipes):
    assert isinstance(pipes["mdt_v1"], MDTPipeline)
    again = MDTInpaintPipeline(**pipes["mdt_v1"].components)
    assert again.transformer is pipes["mdt_v1"].transformer
