"""Job `inpaint`: fill in the masked part of pictures, in this process. The method is inference/inpaint.py's.

    run.json      settings, identity
    images/       <index>.png, filled in
    grid.png      a row for each picture: as it was, what was hidden, filled in; written last
"""

import numpy as np
import torch
from PIL import Image

from mdt_ray import run_folder, storage
from mdt_ray.config import InpaintConfig
from mdt_ray.data import images, listings, readers, sources
from mdt_ray.diffusion.sampling import make_scheduler
from mdt_ray.inference import labels
from mdt_ray.inference.inpaint import MDTInpaintPipeline
from mdt_ray.jobs.evaluate import resolve
from mdt_ray.jobs.measuring import place
from mdt_ray.report import figures

GREY = 128


def inpaint(config: InpaintConfig) -> str:
    """Fill in the first config.num_images pictures of config.images; returns the URI of the grid.

    Does nothing where they are drawn. Raises ValueError for pictures or a mask that cannot be read, no mask or two, and what
    the pipeline refuses.
    """
    checkpoint, _, inputs = resolve(config.checkpoint, config.sampling)
    source = sources.open_source(place(config.images))
    inputs["images"] = source.fingerprint
    if config.mask:
        inputs["mask"] = storage.sha256(storage.read_bytes(storage.absolute(config.mask)))[:16]
    output = storage.absolute(config.output)
    run = run_folder.describe("inpaint", config, inputs)
    run_folder.check_identity(output, run)
    grid = storage.join(output, "grid.png")
    if storage.exists(grid):
        return grid
    facts = storage.read_json(storage.join(checkpoint, "state.json"))
    size, classes = facts["image_size"], labels.asked_for(config.classes, facts)
    known = _read(source, config, size)  # (N, H, W, 3)
    mask = _mask(config.mask, size) if config.mask else None
    pipe = MDTInpaintPipeline.from_pretrained(checkpoint, weights=config.sampling.weights,
                                              scheduler=make_scheduler(config.sampling.sampler))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    hidden = pipe.hidden_tokens(len(known), mask, config.mask_ratio, _generators(config, len(known)))  # (N, L)
    white = _pixels(hidden, pipe.transformer.grid, size)  # (N, H, W)
    with run_folder.claim(output, run):
        filled = pipe(
            torch.from_numpy(known).permute(0, 3, 1, 2).float() / 255, mask_image=white.astype(np.float32),
            class_labels=(classes * len(known) if len(classes) == 1 else classes) or None,
            guidance_scale=config.sampling.cfg_scale, guidance_power=config.sampling.cfg_power,
            guidance_channels=config.sampling.cfg_channels, num_inference_steps=config.sampling.num_sampling_steps,
            generator=_generators(config, len(known)), side_interpolator=config.side_interpolator, output_type="np").images
        filled = (filled * 255).round().astype(np.uint8)  # (N, H, W, 3)
        for i, pixels in enumerate(filled):
            storage.write_bytes(storage.join(output, "images", f"{i:06d}.png"), figures.picture(pixels))
        seen = np.where(white[..., None], GREY, known).astype(np.uint8)
        rows = [np.stack(row) for row in zip(known, seen, filled, strict=True)]
        storage.write_bytes(grid, figures.grid(rows, [str(i) for i in range(len(rows))], ["picture", "masked", "filled in"],
                                               scale=max(0.7, size / 110)))
    return grid


def _read(source: sources.Source, config: InpaintConfig, size: int) -> np.ndarray:
    """The first pictures, cut to the model's size, (N, H, W, 3) uint8."""
    rows = listings.list_images(source).table.slice(0, config.num_images)
    found = images.decode_pieces(readers.read_pieces(source.folder, source.kind, rows, rows.num_rows), size)
    if found.rejected:
        wrong = found.rejected[0]
        raise ValueError(f"images = {config.images!r}: {wrong['id']}: {wrong['reason']}; take it out, or replace it")
    return found.images


def _mask(uri: str, size: int) -> Image.Image:
    try:
        return Image.fromarray(images.center_crop(images.decode_image(storage.read_bytes(storage.absolute(uri))), size))
    except ValueError as error:
        raise ValueError(f"mask = {uri!r}: {error}; give a picture, white where to fill in") from None


def _pixels(hidden: torch.Tensor, grid: tuple[int, int], size: int) -> np.ndarray:
    """Hidden tokens (N, L) as hidden pixels (N, H, W), bool."""
    tokens = hidden.reshape(-1, *grid)
    return tokens.repeat_interleave(size // grid[0], 1).repeat_interleave(size // grid[1], 2).cpu().numpy()


def _generators(config: InpaintConfig, number: int) -> list[torch.Generator]:
    """Picture i is drawn from seed + i."""
    return [torch.Generator().manual_seed(config.seed + i) for i in range(number)]
