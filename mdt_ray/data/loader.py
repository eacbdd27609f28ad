"""Training batches: latents read by row group in the order of the lanes, with every random number of the step drawn.

A step of training is a pure function of the weights and of one of these batches. One thread reads ahead.

B images of this rank, C latent channels, h x w latent size, L tokens.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from mdt_ray.config import NUM_TIMESTEPS
from mdt_ray.data import latents
from mdt_ray.data.latents import Manifest
from mdt_ray.data.order import WINDOW_GROUPS, Order, lanes_of, stream_seed

PREFETCH_BATCHES = 4


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


@dataclass(frozen=True)
class _Group:
    file: latents.LatentFile
    group: int
    rows: np.ndarray
    """Rows of the group that are in the training split."""


class LatentReader:
    """Random access to the training split of a latents folder, with the most recent row groups kept in memory.

    Raises ValueError (from the manifest) for missing, truncated or damaged files.
    """

    def __init__(self, folder: str, manifest: Manifest, max_groups: int):
        self.folder, self.manifest, self.max_groups = folder, manifest, max_groups
        self.groups = _training_groups(manifest)
        self.starts = np.cumsum([0] + [len(g.rows) for g in self.groups])
        self._cache: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Training rows of each row group, in file order."""
        return tuple(len(g.rows) for g in self.groups)

    def read(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Latent moments (n, 2, C, h, w) float16 and labels (n,) of images given by their position in the split."""
        groups = self.starts.searchsorted(images, side="right") - 1
        rows = images - self.starts[groups]
        moments = np.empty((len(images), 2, *self.manifest.shape), np.float16)
        labels = np.empty(len(images), np.int64)
        for group in np.unique(groups):
            here = groups == group
            arrays = self._load(int(group))
            moments[here] = arrays["moments"][rows[here]]
            labels[here] = arrays["label"][rows[here]]
        return moments, labels

    def _load(self, index: int) -> dict[str, np.ndarray]:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        group = self.groups[index]
        arrays = latents.read_group(self.folder, group.file, group.group, self.manifest.shape, flip=False)
        whole = len(group.rows) == len(arrays["label"])  # then there is nothing to copy
        self._cache[index] = arrays if whole else {name: values[group.rows] for name, values in arrays.items()}
        if len(self._cache) > self.max_groups:
            self._cache.popitem(last=False)
        return self._cache[index]


def _training_groups(manifest: Manifest) -> list[_Group]:
    groups = []
    for file in manifest.files:
        train = np.ones(file.num_rows, bool)
        train[file.validation_rows] = False
        for number, first in enumerate(range(0, file.num_rows, file.rows_per_group)):
            rows = np.flatnonzero(train[first:first + file.rows_per_group])
            if len(rows):
                groups.append(_Group(file=file, group=number, rows=rows))
    return groups


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """The identity fields of training that decide what a batch holds."""

    batch_size: int
    num_lanes: int
    seed: int
    num_classes: int
    class_dropout_prob: float
    num_tokens: int


class Loader:
    """Batches of one rank from a given step on. Use as a context manager: it ends the reading thread."""

    def __init__(self, folder: str, manifest: Manifest, config: LoaderConfig, rank: int, world_size: int):
        self.config = config
        self.lanes = lanes_of(rank, world_size, config.num_lanes)
        # Every lane works on one window of row groups and begins the next; all fit at once, and no more are kept.
        self.reader = LatentReader(folder, manifest, max_groups=len(self.lanes) * (WINDOW_GROUPS + 2))
        self.order = Order(self.reader.group_sizes, config.batch_size, config.num_lanes, config.seed)
        self.scale = manifest.vae["scale"]
        self.shift = manifest.vae["shift"]
        self._permutations: dict[int, np.ndarray] = {}
        self._stop = threading.Event()

    def batch(self, step: int, attempt: int = 0) -> Batch:
        """The batch of a step: images, noise, timesteps, masks and label drops, lane by lane."""
        lanes = [self._lane(step, attempt, lane) for lane in self.lanes]
        generator = torch.Generator().manual_seed(stream_seed(self.config.seed, step, attempt, 0, "mask_ratio"))
        draw = torch.rand((), generator=generator).item()
        joined = {name: torch.cat([lane[name] for lane in lanes]) for name in lanes[0]}
        return Batch(step=step, mask_ratio_draw=draw, **joined)

    def batches(self, first_step: int, attempt: int = 0) -> Iterator[Batch]:
        """Endless batches from `first_step` on, read ahead by a thread. Errors of the thread are raised here."""
        ready: queue.Queue = queue.Queue(PREFETCH_BATCHES)

        def read_ahead() -> None:
            step = first_step
            while not self._stop.is_set():
                try:
                    item = self.batch(step, attempt)
                except Exception as error:  # handed to the consumer, which raises it
                    item = error
                while not self._stop.is_set():
                    try:
                        ready.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if isinstance(item, Exception):
                    return
                step += 1

        threading.Thread(target=read_ahead, daemon=True, name="latent-reader").start()
        while True:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()

    def _lane(self, step: int, attempt: int, lane: int) -> dict[str, torch.Tensor]:
        config, size = self.config, self.order.lane_size

        def generator(stream: str) -> torch.Generator:
            return torch.Generator().manual_seed(stream_seed(config.seed, step, attempt, lane, stream))

        images = self._images(self.order.places(step, lane))
        moments, labels = self.reader.read(images)
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
        for epoch in np.unique(epochs):
            if epoch not in self._permutations:
                self._permutations = {e: p for e, p in self._permutations.items() if e >= epoch - 1}
                self._permutations[epoch] = self.order.permutation(int(epoch))
            images[epochs == epoch] = self._permutations[epoch][positions[epochs == epoch]]
        return images
