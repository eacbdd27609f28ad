"""Small real inputs for tests: latents folders as `precompute` writes them, a tiny training run; the parts of a page."""

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch

from mdt_ray.config import EmaConfig, ModelConfig, OptimConfig, TrainConfig
from mdt_ray.data import latents
from mdt_ray.data.latents import Manifest

NO_IMAGES = [
    (torch.zeros(2, 3, 32, 32), "dtype torch.float32"),
    (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), r"\(2, 1, 32, 32\)"),
    (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"\(2, 32, 32, 3\)"),
    (torch.zeros(2, 3, 0, 32, dtype=torch.uint8), r"\(2, 3, 0, 32\)"),
    (torch.zeros(3, 32, 32, dtype=torch.uint8), r"\(3, 32, 32\)"),
]
"""What no feature network that resizes takes for images, and what its error says."""


def make_latents(folder: Path, num_images: int = 100, num_files: int = 2, side: int = 4, num_classes: int = 10,
                 validation_share: float = 0.1, flip: bool = False) -> Manifest:
    """Write a finished latents folder: class-dependent means, so that there is something to learn."""
    rng = np.random.default_rng(0)
    files = []
    for number, rows in enumerate(np.array_split(np.arange(num_images), num_files)):
        labels = [int(row) % num_classes for row in rows]
        mean = rng.normal(size=(len(rows), 4, side, side)) * 0.3 + np.array(labels)[:, None, None, None] / num_classes
        moments = np.stack([mean, np.full_like(mean, 0.05)], axis=1)
        mirrored = moments[..., ::-1] if flip else None
        table = latents.encode_table([f"image-{row:05d}" for row in rows], labels, moments, mirrored, validation_share,
                                     {"shape": [4, side, side]})
        files.append(latents.write_file(str(folder), latents.file_name(number), table, rows_per_group=16))
    manifest = Manifest(identity="test", shape=[4, side, side], image_size=32, num_classes=num_classes, flip=flip,
                        vae={"path": "digits", "revision": None, "scale": 1.0, "shift": 0.0, "weights_hash": "none"},
                        class_counts=[num_images // num_classes] * num_classes,
                        class_names=[str(c) for c in range(num_classes)], files=files)
    latents.write_rejected(str(folder), [])
    latents.write_manifest(str(folder), manifest)
    return manifest


def tiny_training(latents_folder: Path, output: Path, **changes) -> TrainConfig:
    """A run of a 2-block model in float32, logged at every step."""
    base = TrainConfig(
        latents=str(latents_folder), output=str(output), batch_size=24, num_lanes=12, num_steps=20, precision="fp32",
        model=ModelConfig(patch_size=1, hidden_size=32, depth=3, num_heads=2, decode_layer=1),
        optim=OptimConfig(lr=1e-3, warmup_steps=5, schedule="cosine", schedule_steps=20, clip_norm=1.0),
        ema=EmaConfig(decay=0.99, warmup=True), log_every_steps=1, checkpoint_every_steps=10)
    return dataclasses.replace(base, **changes)


class Page(HTMLParser):
    """Counts what a browser would fetch, show and close."""

    def __init__(self, text: str):
        super().__init__()
        self.images, self.fetched, self.headings, self.open, self.text, self.tags = [], [], [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags |= {tag, *(name for name in attributes if name.startswith("on"))}
        if tag == "img":
            self.images.append(attributes)
        self.fetched += [v for k, v in attributes.items() if k in ("src", "href") and not v.startswith("data:")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
