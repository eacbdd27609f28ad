"""The actors of an evaluation that read and measure pictures; those that draw them are in jobs/draw_stages.py. Each does its
part of a chunk and hands it on; the last writes the chunk's file.

An item is a small dict, its arrays travel as safetensors bytes. The same item gives the same bytes, whoever works on it.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from mdt_ray.config import WorkersConfig
from mdt_ray.data.picture_sets import read_range
from mdt_ray.evaluation import chunks, extractors
from mdt_ray.interrupts import Stopped, Wish
from mdt_ray.jobs import session
from mdt_ray.jobs.fanout import Stage

ARRAYS = "arrays"


class Read:
    """Pictures that exist: an item names the set, start and stop."""

    def __init__(self, handed: list[dict[str, Any]]):
        self.handed = handed

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        pictures, labels, num_rejected = read_range(self.handed[item["plan"]], item["start"], item["stop"],
                                                    item["chunk_size"], item["image_size"], item["exact"])
        return item | packed(pictures=pictures, labels=labels) | {"num_rejected": num_rejected}


class Measure:
    """Pictures -> features in the item's file; what is returned is small."""

    def __init__(self, workers: dict[str, Any]):
        device = session.settle(WorkersConfig(**workers))
        self.extractor = functools.cache(lambda name, weights: extractors.load_extractor(name, weights, device))

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        arrays = load_safetensors(item.pop(ARRAYS))
        kept = chunks.kept_rows(item["start"], item["stop"], item["num_kept"], item.get("total") or None)
        kept = kept[kept < len(arrays["pictures"])]
        extractor = self.extractor(item["extractor"], item["extractor_weights"])
        chunks.write_chunk(item["uri"], chunks.measure(extractor, arrays["pictures"], arrays["labels"], kept,
                                                       arrays.get("latents"), item.get("num_rejected", 0)))
        return item | {"num_images": item["stop"] - item["start"]}


def reading(handed: list[dict[str, Any]], workers: WorkersConfig) -> list[Stage]:
    """The stages of pictures that exist: the feature networks have the workers' devices, and a reader each."""
    readers = WorkersConfig(num_workers=workers.num_workers)
    return [Stage(Read, (handed,), readers, False), Stage(Measure, (vars(workers),), workers)]


def here(stages: list[Stage], items: list[dict[str, Any]], wish: Wish | None = None) -> Iterator[dict[str, Any]]:
    """The same work in this process, without Ray. Raises Stopped before the next item where it is asked to stop."""
    workers = [stage.worker(*stage.arguments) for stage in stages] if items else []
    for item in items:
        if wish is not None and wish.signum is not None:
            raise Stopped(wish.signum, "stopped; the chunks so far are kept")
        for work in workers:
            item = work(item)
        yield item


def packed(**arrays: np.ndarray) -> dict[str, bytes]:
    """The part of an item that holds arrays."""
    return {ARRAYS: save_safetensors({name: np.ascontiguousarray(value) for name, value in arrays.items()})}
