"""Who reads which image when, and with which random numbers: pure functions of (seed, step, attempt, lane).

Training reads one endless stream; place s of it is position s % N of the permutation of epoch s // N. A batch is cut into
lanes of equal size; lane j of step n holds places n B + j b .. n B + (j + 1) b. Nothing here depends on the number of
workers, so any worker may own any lanes. Not a reader: that is loader.py.

N images, B batch, L lanes, b = B / L images a lane.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

WINDOW_GROUPS = 8
"""Row groups whose rows are mixed within a lane: what a lane holds in memory, and how far an image can travel."""


@dataclass(frozen=True)
class Order:
    """The order of one training run.

    Args:
        group_sizes: rows of each row group in file order; image i is row i of their concatenation.
        batch_size, num_lanes: B and L; L divides B.
        seed: of the permutations.
    Raises ValueError if there are no images or the lanes do not divide the batch.
    """

    group_sizes: tuple[int, ...]
    batch_size: int
    num_lanes: int
    seed: int

    def __post_init__(self):
        if self.num_images == 0:
            raise ValueError("latents: hold no training image; precompute some, or lower validation_share")
        if self.batch_size % self.num_lanes:
            raise ValueError(f"num_lanes = {self.num_lanes}: must divide batch_size = {self.batch_size}")

    @property
    def num_images(self) -> int:
        return sum(self.group_sizes)

    @property
    def lane_size(self) -> int:
        return self.batch_size // self.num_lanes

    def places(self, step: int, lane: int) -> np.ndarray:
        """Places of the stream that a lane reads at a step, (b,) int64."""
        first = step * self.batch_size + lane * self.lane_size
        return np.arange(first, first + self.lane_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """Image at each position of an epoch, (N,) int64.

        The row groups are shuffled and laid end to end; each lane gets one stretch of them and reads it in windows of a few
        row groups, whose rows are shuffled. So a lane touches few row groups, while a batch draws from all over the data.
        """
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        sizes = np.asarray(self.group_sizes)
        starts = np.concatenate([[0], sizes.cumsum()[:-1]])
        shuffled = rng.permutation(len(sizes))
        images = np.concatenate([np.arange(starts[g], starts[g] + sizes[g]) for g in shuffled])  # (N,)
        # An epoch need not start at a batch's start, so the lane of a position shifts from epoch to epoch.
        places = epoch * self.num_images + np.arange(self.num_images)  # (N,)
        lanes = places % self.batch_size // self.lane_size  # (N,)
        window = WINDOW_GROUPS * int(sizes.max())
        counts = np.bincount(lanes, minlength=self.num_lanes)  # (L,)
        for first, count in zip(counts.cumsum() - counts, counts, strict=True):
            for low in range(first, first + count, window):
                rng.shuffle(images[low:min(low + window, first + count)])
        permutation = np.empty_like(images)
        permutation[lanes.argsort(kind="stable")] = images
        return permutation


def lanes_of(rank: int, world_size: int, num_lanes: int) -> range:
    """Lanes that a rank owns; counts differ by at most one."""
    return range(rank, num_lanes, world_size)


def stream_seed(seed: int, step: int, attempt: int, lane: int, stream: str) -> int:
    """Seed of the generator of one named stream of random numbers, 0..2^63 - 1.

    `attempt` counts returns to an earlier checkpoint after a non-finite loss, so that a retried step draws afresh.
    """
    key = f"{seed}/{step}/{attempt}/{lane}/{stream}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
