"""Training batches: latents read by row group in the order of the lanes, with every random number of the step drawn.

A step of training is a pure function of the weights and of one of these batches. One thread makes them ahead, others fetch
row groups ahead of it.

B images of this rank, C latent channels, h x w latent size, L tokens.
"""

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch

from mdt_ray.config import NUM_TIMESTEPS, require
from mdt_ray.data.latent_reader import LatentReader
from mdt_ray.data.latents import Manifest
from mdt_ray.data.order import NUM_SLOTS, Order, lanes_of, stream_seed

PREFETCH_BATCHES = 4
"""Finished batches that wait to be taken."""
FETCH_STEPS = 16
"""Steps whose row groups are fetched ahead: at 4,000 images/s and batch 256, a second."""
FETCH_THREADS = 16
"""Row groups on their way at a time: an object store takes some 0.1 s for one (two or three requests)."""
SPARE_GROUPS = 2
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
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in moved.items()}
        return Batch(**moved)


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


class Loader:
    """Batches of one rank from a given step on. Use as a context manager: it ends the threads.

    Holds at most lanes x (NUM_SLOTS + SPARE_GROUPS) row groups (128 rows of 256-pixel latents: 2 MiB each, with flip 4), and
    PREFETCH_BATCHES + 2 batches.

    Args: accumulation, the number of micro-batches into which the rank's lanes are cut.
    Raises ValueError for too few lanes, and where mirror images are asked for that the latents do not have.
    """

    def __init__(self, folder: str, manifest: Manifest, config: LoaderConfig, rank: int, world_size: int,
                 accumulation: int = 1):
        require(1 <= accumulation <= config.num_lanes // world_size, "accumulation", accumulation,
                f"must be at least 1, and times {world_size} workers not exceed num_lanes = {config.num_lanes}: a "
                "micro-batch is whole lanes")
        require(manifest.flip or not config.flip, "flip", config.flip,
                f"{folder} holds no mirror images (moments_flip); run `mdt-ray precompute --flip`, or train with --no-flip")
        self.config = config
        self.lanes = lanes_of(rank, world_size, config.num_lanes)
        self.parts = [part.tolist() for part in np.array_split(self.lanes, accumulation)]
        self.reader = LatentReader(folder, manifest, len(self.lanes) * (NUM_SLOTS + SPARE_GROUPS), flip=config.flip)
        self.order = Order(self.reader.group_sizes, config.batch_size, config.num_lanes, config.seed)
        self.scale = manifest.vae["scale"]
        self.shift = manifest.vae["shift"]
        self._permutations: dict[int, np.ndarray] = {}
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def batch(self, step: int, attempt: int = 0) -> Batch:
        """The rank's whole batch of a step: images, noise, timesteps, masks and label drops, lane by lane."""
        return self._batch(step, attempt, self.lanes)

    def micro_batches(self, step: int, attempt: int = 0) -> tuple[Batch, ...]:
        """The same cut into `accumulation` parts of whole lanes, whose numbers differ by at most one."""
        return tuple(self._batch(step, attempt, lanes) for lanes in self.parts)

    def batches(self, first_step: int, attempt: int = 0) -> Iterator[tuple[Batch, ...]]:
        """Endless micro-batches of the steps from `first_step` on, read ahead by threads. Their errors are raised here."""
        ready: queue.Queue = queue.Queue(PREFETCH_BATCHES)
        thread = threading.Thread(target=self._read_ahead, args=(first_step, attempt, ready), daemon=True, name="batches")
        self._threads.append(thread)
        thread.start()
        while True:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _read_ahead(self, first_step: int, attempt: int, ready: queue.Queue) -> None:
        """Put batches in the queue, while a pool fetches the row groups of the next FETCH_STEPS steps."""
        coming: deque[np.ndarray] = deque()
        pool = ThreadPoolExecutor(FETCH_THREADS, "latents")
        try:
            for step in itertools.count(first_step):
                while len(coming) < FETCH_STEPS:
                    places = [self.order.places(step + len(coming), lane) for lane in self.lanes]
                    coming.append(np.unique(self.reader.groups_of(self._images(np.concatenate(places)))))
                self.reader.fetch(dict.fromkeys(np.concatenate(coming).tolist()), pool)
                coming.popleft()
                self._put(ready, self.micro_batches(step, attempt))
                if self._stop.is_set():
                    return
        except Exception as error:  # handed to the consumer, which raises it
            self._put(ready, error)
        finally:
            pool.shutdown(cancel_futures=True)

    def _put(self, ready: queue.Queue, item: tuple[Batch, ...] | Exception) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def _batch(self, step: int, attempt: int, lanes: Iterable[int]) -> Batch:
        parts = [self._lane(step, attempt, lane) for lane in lanes]
        generator = torch.Generator().manual_seed(stream_seed(self.config.seed, step, attempt, 0, "mask_ratio"))
        draw = torch.rand((), generator=generator).item()
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Batch(step=step, mask_ratio_draw=draw, **joined)

    def _lane(self, step: int, attempt: int, lane: int) -> dict[str, torch.Tensor]:
        config, size = self.config, self.order.lane_size

        def generator(stream: str) -> torch.Generator:
            return torch.Generator().manual_seed(stream_seed(config.seed, step, attempt, lane, stream))

        images = self._images(self.order.places(step, lane))
        mirrored = (torch.rand(size, generator=generator("flip")) < 0.5).numpy() if config.flip else None
        moments, labels = self.reader.read(images, mirrored)
        mean, std = torch.from_numpy(moments).float().unbind(1)  # 2 x (b, C, h, w)
        x_0 = mean + std * torch.randn(mean.shape, generator=generator("posterior"))
        y = torch.from_numpy(labels)

        def dropped(stream: str) -> torch.Tensor:
            coin = torch.rand(size, generator=generator(stream)) < config.class_dropout_prob
            return torch.where(coin, config.num_classes, y)

        return {
            "images": torch.from_numpy(images),
            "x_0": (x_0 - self.shift) * self.scale,
            "t": torch.randint(NUM_TIMESTEPS, (size,), generator=generator("t")),
            "eps_full": torch.randn(mean.shape, generator=generator("eps_full")),
            "eps_masked": torch.randn(mean.shape, generator=generator("eps_masked")),
            "y_full": dropped("label_full"),
            "y_masked": dropped("label_masked"),
            "mask_noise": torch.rand(size, config.num_tokens, generator=generator("mask")),
        }

    def _images(self, places: np.ndarray) -> np.ndarray:
        """Images at places of the stream; a lane may span two epochs."""
        epochs, positions = places // self.order.num_images, places % self.order.num_images
        images = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            images[epochs == epoch] = self._permutation(epoch)[positions[epochs == epoch]]
        return images

    def _permutation(self, epoch: int) -> np.ndarray:
        found = self._permutations.get(epoch)
        if found is None:
            found = self.order.permutation(epoch)
            num_epochs = 2 + FETCH_STEPS * self.config.batch_size // self.order.num_images  # that are looked at in turn
            kept = {e: p for e, p in self._permutations.items() if epoch - num_epochs < e < epoch}
            self._permutations = kept | {epoch: found}  # a new dict, since another thread may be looking into the old one
        return found
