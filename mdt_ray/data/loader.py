"""Training batches: latents read by row group in the order of the lanes, with every random number of the step drawn.

A step of training is a pure function of the weights and of one of these batches. A thread makes them ahead, others fetch row
groups ahead of it. (Two that make batches gain speed beyond need, and hold up the training loop where it takes one.)

B images of this rank, C latent channels, h x w latent size, L tokens.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from mdt_ray.config import NUM_TIMESTEPS, require
from mdt_ray.data.latent_reader import LatentReader
from mdt_ray.data.latents import Manifest
from mdt_ray.data.order import NUM_SLOTS, Order, lanes_of, stream_seed

PREFETCH_BATCHES = 4
"""Batches being made, or finished and waiting to be taken."""
FETCH_STEPS = 16
"""Steps whose row groups are fetched ahead: at 4,000 images/s and batch 256, a second."""
FETCH_THREADS = 32
"""Row groups on their way at a time: an object store takes some 0.1 s for one (two or three requests)."""
SPARE_GROUPS = 4
"""Row groups held for a lane beside those that it draws from: those fetched ahead."""


@dataclass(frozen=True)
class Batch:
    """What one rank needs for one step."""

    step: int
    images: torch.Tensor  # (B,) int64, position of each image in the training split
    x_0: torch.Tensor  # (B, C, h, w) float32, scaled latents
    t: torch.Tensor  # (B,) int64
    eps_full: torch.Tensor  # (B, C, h, w), noise of the full pass
    eps_masked: torch.Tensor  # (B, C, h, w), noise of the masked pass
    y_full: torch.Tensor  # (B,) int64, labels of the full pass, some replaced by the null label
    y_masked: torch.Tensor  # (B,) int64
    mask_noise: torch.Tensor  # (B, L), whose smallest entries are kept
    mask_ratio_draw: float  # in [0, 1), the same on every rank: where in its span the step's mask ratio lies

    def to(self, device: torch.device) -> "Batch":
        """On another device; the host does not wait for the copies from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In memory that a GPU copies from by itself."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: function(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()})


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """The identity fields of training that decide what a batch holds."""

    batch_size: int
    num_lanes: int
    seed: int
    num_classes: int
    class_dropout_prob: float
    num_tokens: int
    flip: bool = False
    """Take the mirror image of every image with p = 0.5."""


def check_flip(folder: str, manifest: Manifest, flip: bool) -> None:
    """Raise ValueError where mirror images are wanted that the latents in `folder` do not hold."""
    require(manifest.flip or not flip, "flip", flip,
            f"{folder} holds no mirror images (moments_flip); run `mdt-ray precompute --flip`, or train with --no-flip")


class Loader:
    """Batches of one rank from a given step on. Use as a context manager: it ends the threads.

    Holds at most lanes x (NUM_SLOTS + SPARE_GROUPS) row groups (128 rows of 256-pixel latents: 2 MiB each, with flip 4), and
    PREFETCH_BATCHES batches.

    Args:
        accumulation: the number of micro-batches into which the rank's lanes are cut.
        pin_memory: what `batches` gives is pinned, for a GPU.
    Raises ValueError for too few lanes, and where mirror images are asked for that the latents do not have.
    """

    def __init__(self, folder: str, manifest: Manifest, config: LoaderConfig, rank: int, world_size: int,
                 accumulation: int = 1, pin_memory: bool = False):
        require(1 <= accumulation <= config.num_lanes // world_size, "accumulation", accumulation,
                f"must be at least 1, and times {world_size} workers not exceed num_lanes = {config.num_lanes}: a "
                "micro-batch is whole lanes")
        check_flip(folder, manifest, config.flip)
        self.config, self.pin_memory = config, pin_memory
        self.lanes = lanes_of(rank, world_size, config.num_lanes)
        self.parts = [part.tolist() for part in np.array_split(self.lanes, accumulation)]
        self.reader = LatentReader(folder, manifest, len(self.lanes) * (NUM_SLOTS + SPARE_GROUPS), flip=config.flip)
        self.order = Order(self.reader.group_sizes, config.batch_size, config.num_lanes, config.seed)
        self.scale = manifest.vae["scale"]
        self.shift = manifest.vae["shift"]
        self._permutations: dict[int, np.ndarray] = {}
        self._permuting = threading.Lock()
        self._needed: dict[int, list[int]] = {}
        self._maker = ThreadPoolExecutor(1, "batches")
        self._fetchers = ThreadPoolExecutor(FETCH_THREADS, "latents")

    def batch(self, step: int, attempt: int = 0) -> Batch:
        """The rank's whole batch of a step: images, noise, timesteps, masks and label drops, lane by lane."""
        return self._batch(step, attempt, self.lanes)

    def micro_batches(self, step: int, attempt: int = 0) -> tuple[Batch, ...]:
        """The same cut into `accumulation` parts of whole lanes, whose numbers differ by at most one."""
        return tuple(self._batch(step, attempt, lanes) for lanes in self.parts)

    def batches(self, first_step: int, attempt: int = 0) -> Iterator[tuple[Batch, ...]]:
        """Endless micro-batches of the steps from `first_step` on, made ahead by threads, whose errors are raised here."""
        ready: deque[Future[tuple[Batch, ...]]] = deque()
        for step in itertools.count(first_step):
            while len(ready) < PREFETCH_BATCHES:
                ready.append(self._maker.submit(self._make, step + len(ready), attempt))
            yield ready.popleft().result()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self._fetchers.shutdown(cancel_futures=True)  # first, so that the maker does not wait for what will not come
        self._maker.shutdown(cancel_futures=True)

    def _make(self, step: int, attempt: int) -> tuple[Batch, ...]:
        """The micro-batches of a step, once the row groups of FETCH_STEPS steps from it on are being fetched."""
        # The order of an epoch takes half a second for a million images, so the next one's is made well before its time.
        self._fetchers.submit(self._permutation, step * self.config.batch_size // self.order.num_images + 1)
        steps = range(step, step + FETCH_STEPS)
        needed = {n: groups for n, groups in self._needed.items() if n >= step}
        needed |= {n: self._groups(n) for n in steps if n not in needed}
        self._needed = needed
        self.reader.fetch(dict.fromkeys(itertools.chain.from_iterable(needed[n] for n in steps)), self._fetchers)
        parts = self.micro_batches(step, attempt)
        return tuple(part.pinned() for part in parts) if self.pin_memory else parts

    def _groups(self, step: int) -> list[int]:
        """Row groups that the rank reads at a step."""
        return np.unique(self.reader.groups_of(self._images(step, self.lanes))).tolist()

    def _batch(self, step: int, attempt: int, lanes: Sequence[int]) -> Batch:
        config = self.config
        shape = tuple(self.reader.manifest.shape)

        def generator(lane: int, stream: str) -> torch.Generator:
            return torch.Generator().manual_seed(stream_seed(config.seed, step, attempt, lane, stream))

        def draw(stream: str, fill: Callable[..., Any], *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            """A tensor (B, *shape) that `fill` fills lane by lane, each with its own generator."""
            values = torch.empty(len(lanes), self.order.lane_size, *shape, dtype=dtype)  # one allocation for all is faster
            for part, lane in zip(values, lanes, strict=True):
                fill(part, generator=generator(lane, stream))
            return values.flatten(0, 1)

        normal, uniform = torch.Tensor.normal_, torch.Tensor.uniform_
        images = self._images(step, lanes)
        mirrored = (draw("flip", uniform) < 0.5).numpy() if config.flip else None
        moments, labels = map(torch.from_numpy, self.reader.read(images, mirrored))  # (B, 2, C, h, w), (B,)
        x_0 = draw("posterior", normal, *shape).mul_(moments[:, 1]).add_(moments[:, 0])  # (B, C, h, w)

        def dropped(stream: str) -> torch.Tensor:
            return torch.where(draw(stream, uniform) < config.class_dropout_prob, config.num_classes, labels)

        return Batch(
            step=step, images=torch.from_numpy(images),
            x_0=x_0.sub_(self.shift).mul_(self.scale),
            t=draw("t", lambda part, generator: part.random_(NUM_TIMESTEPS, generator=generator), dtype=torch.int64),
            eps_full=draw("eps_full", normal, *shape),
            eps_masked=draw("eps_masked", normal, *shape),
            y_full=dropped("label_full"),
            y_masked=dropped("label_masked"),
            mask_noise=draw("mask", uniform, config.num_tokens),
            mask_ratio_draw=torch.rand((), generator=generator(0, "mask_ratio")).item())

    def _images(self, step: int, lanes: Sequence[int]) -> np.ndarray:
        """Images that lanes read at a step, (B,) int64; a lane may span two epochs."""
        places = np.concatenate([self.order.places(step, lane) for lane in lanes])
        epochs, positions = places // self.order.num_images, places % self.order.num_images
        images = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            images[epochs == epoch] = self._permutation(epoch)[positions[epochs == epoch]]
        return images

    def _permutation(self, epoch: int) -> np.ndarray:
        found = self._permutations.get(epoch)
        if found is None:
            with self._permuting:  # one thread computes it, the others wait
                found = self._permutations.get(epoch)
                if found is None:
                    found = self.order.permutation(epoch)
                    num_epochs = 3 + FETCH_STEPS * self.config.batch_size // self.order.num_images  # looked at in turn
                    kept = {e: p for e, p in self._permutations.items() if epoch - num_epochs < e < epoch}
                    self._permutations = kept | {epoch: found}  # a new dict, since others may be looking into the old one
        return found
