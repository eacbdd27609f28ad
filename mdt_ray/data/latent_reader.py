"""Random access to the rows of a latents folder, by whole row groups that are kept and fetched ahead. Knows no order: that
is order.py.

C latent channels, h x w latent size.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mdt_ray.data import latents
from mdt_ray.data.latents import Manifest


@dataclass(frozen=True)
class _Group:
    file: latents.LatentFile
    group: int
    rows: np.ndarray
    """Rows of the group that are in the split."""


class LatentReader:
    """One split of a latents folder. Threads may share it.

    At most `max_groups` row groups are held, those on their way among them; each takes rows x 2 x C x h x w x 2 bytes, with
    `flip` twice that. What is wanted soonest goes last. A group that has gone is read again.

    Args:
        flip: read the mirror images too; else their bytes are not touched.
    Raises ValueError (from the manifest) for missing, truncated or damaged files.
    """

    def __init__(self, folder: str, manifest: Manifest, max_groups: int, split: Literal["train", "validation"] = "train",
                 flip: bool = False):
        assert split in ("train", "validation"), split
        self.folder, self.manifest, self.max_groups, self.flip = folder, manifest, max_groups, flip
        self.groups = _groups_of(manifest, split)
        self.starts = np.cumsum([0] + [len(g.rows) for g in self.groups])
        self._held: OrderedDict[int, Future[dict[str, np.ndarray]]] = OrderedDict()  # what may go first, first
        self._lock = threading.Lock()

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """The split's rows in each row group, in file order."""
        return tuple(len(g.rows) for g in self.groups)

    @property
    def num_images(self) -> int:
        """Images of the split."""
        return int(self.starts[-1])

    def groups_of(self, images: np.ndarray) -> np.ndarray:
        """Row group of each image, as a number in `groups`."""
        return self.starts.searchsorted(images, side="right") - 1

    def read(self, images: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Latent moments (n, 2, C, h, w) float16 and labels (n,) of images given by their position in the split.

        Args: mirrored (n,) bool, of which images the mirror image is meant; needs `flip`.
        """
        groups = self.groups_of(images)
        rows = images - self.starts[groups]
        moments = np.empty((len(images), 2, *self.manifest.shape), np.float16)
        labels = np.empty(len(images), np.int64)
        by_group = groups.argsort(kind="stable")
        firsts = np.flatnonzero(np.diff(groups[by_group], prepend=-1))
        for here in np.split(by_group, firsts)[1:]:
            arrays = self._get(int(groups[here[0]]))
            moments[here] = arrays["moments"][rows[here]]
            labels[here] = arrays["label"][rows[here]]
            if mirrored is not None:
                here = here[mirrored[here]]
                moments[here] = arrays["moments_flip"][rows[here]]
        return moments, labels

    def fetch(self, groups: Iterable[int], pool: Executor) -> None:
        """Have a pool read groups, given in the order in which they will be needed, as far as all of them fit at once. An
        error is raised by the `read` that needs the group."""
        wanted = list(groups)[:self.max_groups]
        with self._lock:
            for group in reversed(wanted):  # the sooner needed, the later it goes
                if group in self._held:
                    self._held.move_to_end(group)
            for group in wanted:
                if group not in self._held:
                    self._hold(group, pool.submit(self._load, group))

    def _get(self, group: int) -> dict[str, np.ndarray]:
        with self._lock:
            future = self._held.get(group)
            if here := future is None:
                future = self._hold(group, Future())
            self._held.move_to_end(group)
        if here:  # nobody fetched it: this thread does
            try:
                future.set_result(self._load(group))
            except Exception as error:  # for the threads that wait for it; raised below
                future.set_exception(error)
        return future.result()

    def _hold(self, group: int, future: Future) -> Future:
        while len(self._held) >= self.max_groups:
            self._held.popitem(last=False)
        self._held[group] = future
        return future

    def _load(self, index: int) -> dict[str, np.ndarray]:
        group = self.groups[index]
        arrays = latents.read_group(self.folder, group.file, group.group, self.manifest.shape, self.flip)
        whole = len(group.rows) == len(arrays["label"])  # then there is nothing to copy
        return arrays if whole else {name: values[group.rows] for name, values in arrays.items()}


def _groups_of(manifest: Manifest, split: str) -> list[_Group]:
    groups = []
    for file in manifest.files:
        chosen = np.full(file.num_rows, split == "train")
        chosen[file.validation_rows] = split == "validation"
        for number, first in enumerate(range(0, file.num_rows, file.rows_per_group)):
            rows = np.flatnonzero(chosen[first:first + file.rows_per_group])
            if len(rows):
                groups.append(_Group(file=file, group=number, rows=rows))
    return groups
