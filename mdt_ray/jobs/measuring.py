"""Pictures that exist -> chunks of features in a folder, by the pool or here: what `evaluate` and `reference` share.

    <folder>/listing.parquet                which pictures make which chunk, for a source
    <folder>/chunks/<first>.safetensors     features of pictures first, first + 1, ...
"""

import os
from dataclasses import dataclass
from typing import Any

from mdt_ray import config_io, storage
from mdt_ray.config import WorkersConfig
from mdt_ray.data.picture_sets import PictureSet
from mdt_ray.evaluation import chunks
from mdt_ray.jobs import fanout, progress, session, stages


@dataclass(frozen=True)
class Measurement:
    """A set of pictures, and how it is measured."""

    pictures: PictureSet
    folder: str
    image_size: int
    """Side to crop a source's pictures to; those of an npz have it."""
    exact: bool
    """Crop nothing and leave nothing out."""
    extractor: str
    extractor_weights: str
    chunk_size: int
    num_images: int
    """The first so many of the set."""
    num_kept: int
    """Pictures to keep in the chunks: the first, or spread over all."""
    spread: bool = False

    def items(self) -> dict[str, dict[str, Any]]:
        """File of each chunk -> its item of work."""
        shared = {"image_size": self.image_size, "exact": self.exact, "extractor": self.extractor,
                  "extractor_weights": self.extractor_weights, "chunk_size": self.chunk_size, "num_kept": self.num_kept,
                  "total": self.num_images if self.spread else 0}
        return {uri: shared | {"uri": uri, "start": start, "stop": stop}
                for uri, start, stop in chunk_ranges(self.folder, self.num_images, self.chunk_size)}

    def fingerprint(self, weights_hash: str) -> str:
        """Names the features: equal for equal pictures, network and cut."""
        return config_io.fingerprint([self.pictures.fingerprint, self.extractor, weights_hash, self.image_size, self.exact,
                                      self.chunk_size, self.num_images, self.num_kept, self.spread, chunks.FORMAT])


def place(uri: str) -> str:
    """Of a set of pictures: a path made absolute (workers change directory)."""
    return uri if uri in ("", "digits") else storage.absolute(uri)


def absolute_weights(name: str) -> str:
    """Of an extractor: a path made absolute; URLs and hub ids as they are."""
    return storage.absolute(name) if name and os.path.exists(os.path.expanduser(name)) else name


def chunk_ranges(folder: str, count: int, size: int) -> list[tuple[str, int, int]]:
    """File, first index and end of each chunk."""
    return [(storage.join(folder, "chunks", f"{start:08d}.safetensors"), start, min(start + size, count))
            for start in range(0, count, size)]


def missing_items(measurements: list[Measurement]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Items of the chunks that are not there, and what `Read` takes for them."""
    todo: list[dict[str, Any]] = []
    handed: list[dict[str, Any]] = []
    for m in {m.folder: m for m in measurements}.values():  # two evaluations may share a folder
        have = storage.list_sizes(storage.join(m.folder, "chunks"))
        missing = [item for uri, item in m.items().items() if not is_there(uri, have)]
        if missing:
            todo += [item | {"plan": len(handed)} for item in missing]
            handed.append(m.pictures.hand_out(m.folder, m.chunk_size))
    return todo, handed


def is_there(uri: str, sizes: dict[str, int]) -> bool:
    """Whether a file is in a folder's listing, and not empty."""
    return sizes.get(storage.base(uri).rpartition("/")[2], 0) > 0


def measure_missing(measurements: list[Measurement], workers: WorkersConfig, pool: bool, title: str) -> None:
    """Write the chunks that are not there. Raises ValueError for pictures that cannot be measured."""
    todo, handed = missing_items(measurements)
    if not todo:
        return
    if not pool:
        for _ in stages.here(stages.reading(handed, workers), todo):
            pass
        return
    session.start()
    total = sum(m.num_images for m in {m.folder: m for m in measurements}.values())
    waiting = sum(item["stop"] - item["start"] for item in todo)
    with progress.bar(total, "image", title, initial=total - waiting) as bar:
        for row in fanout.run_stages(todo, stages.reading(handed, workers)):
            bar.update(row["num_images"])
