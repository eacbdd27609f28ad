"""Who reads which image when, and with which random numbers: pure functions of (seed, step, attempt, lane).

Training reads one endless stream; place s of it is position s % N of the permutation of epoch s // N. A batch is cut into
lanes of equal size; lane j of step n holds places n B + j b .. n B + (j + 1) b. Nothing here depends on the number of
workers, so any worker may own any lanes. Not a reader: that is loader.py.

N images, B batch, L lanes, b = B / L images a lane.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

NUM_SLOTS = 16
"""Row groups that a lane draws from at a time: what it holds in memory. Fewer make batches more regular than random ones,
since a lane's share of the classes is then fixed (their counts vary by 1 - 1/16 of what random draws would)."""


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

        The file order, a ring, is cut from a random place on into W bands, each band into a stretch for every lane. A lane
        has one stretch of each band: its slots. It reads a slot's row groups one after another, with their rows shuffled,
        and takes its next image from a slot drawn at random. So a lane holds W row groups at a time, while every batch draws
        from all over the data, whatever their order. A slot's groups come in random order, but the one that its stretch cuts
        into comes first: such pieces differ in length, so that the slots do not all begin their next groups at one time.
        (W = NUM_SLOTS, P pieces: row groups, and parts of those in which a stretch ends.)
        """
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        # An epoch need not start at a batch's start, so the lane of a position shifts from epoch to epoch.
        places = epoch * self.num_images + np.arange(self.num_images)  # (N,)
        lanes = places % self.batch_size // self.lane_size  # (N,)
        counts = np.bincount(lanes, minlength=self.num_lanes)[:, None]  # (L, 1)
        lengths = counts // NUM_SLOTS + (np.arange(NUM_SLOTS) < counts % NUM_SLOTS)  # (L, W), images of each slot
        stretches = np.concatenate([rng.permutation(self.num_lanes) * NUM_SLOTS + k for k in range(NUM_SLOTS)])  # (L W,)
        slots = np.repeat(stretches, lengths.ravel()[stretches])  # (N,), of each image; slot k of lane j is j W + k
        cut = rng.integers(self.num_images)
        groups = np.roll(np.repeat(np.arange(len(self.group_sizes)), self.group_sizes), -cut)  # (N,)
        edges = (np.diff(slots, prepend=-1) != 0) | (np.diff(groups, prepend=-1) != 0)  # (N,), where a piece begins
        owners = slots[edges]  # (P,), the slot of each piece
        follows = np.diff(owners, prepend=-1) == 0  # (P,), not the first piece of its slot
        ranks = np.empty_like(owners)
        ranks[np.lexsort((rng.random(len(owners)) * follows, owners))] = np.arange(len(owners))
        rows = (ranks[edges.cumsum() - 1] + rng.random(self.num_images)).argsort(kind="stable")  # (N,), slot by slot
        images, slots = (rows + cut) % self.num_images, slots[rows]  # (N,), (N,) ascending
        drawn = slots[(slots // NUM_SLOTS + rng.random(self.num_images)).argsort(kind="stable")]  # (N,), lane by lane
        permutation = np.empty_like(images)
        permutation[lanes.argsort(kind="stable")[drawn.argsort(kind="stable")]] = images
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
