"""Samples of checkpoints -> chunks of features, by pools of samplers, decoders and feature networks or here."""

import logging
from typing import Any

from mdt_ray import config_io, storage
from mdt_ray.config import EvaluateConfig, WorkersConfig
from mdt_ray.interrupts import Wish
from mdt_ray.jobs import draw_stages, fanout, progress, session, stages, units
from mdt_ray.jobs.measuring import Measurement, chunk_ranges, is_there, missing_items

logger = logging.getLogger(__name__)


def draw_missing(configs: list[EvaluateConfig], references: list[Measurement], workers: WorkersConfig,
                 pool: bool, wish: Wish | None = None) -> dict[str, float] | None:
    """Write the chunks that are not there; returns how busy the samplers were, where anything was drawn.

    Args:
        configs: resolved ones.
        references: real images to be measured by the way.
        pool: False works in this process, without Ray.
        wish: of such work, looked at before each chunk. Raises Stopped.
    """
    items: list[dict[str, Any]] = []
    done: set[int] = set()
    for number, config in enumerate(configs):
        have = storage.list_sizes(storage.join(config.output, "chunks"))
        for uri, start, stop in chunk_ranges(config.output, config.num_samples, config.chunk_size):
            if is_there(uri, have):
                done.add(len(items))
            items.append({"uri": uri, "start": start, "stop": stop, "plan": number, "number": len(items),
                          "num_kept": config.keep_images, "extractor": config.extractor,
                          "extractor_weights": config.extractor_weights})
    real, handed = missing_items(references)
    todo = real + [item for item in items if item["number"] not in done]
    if not todo:
        return None
    plain = [config_io.to_dict(config) for config in configs]
    if not pool:
        return _busy(list(stages.here(draw_stages.drawing(plain, handed, workers), todo, wish)))
    session.start()
    sizes = [item["stop"] - item["start"] for item in items]
    with progress.bar(sum(sizes), "image", "evaluate", initial=sum(sizes[k] for k in done)) as bar:
        with progress.watched(progress.Parts(bar, sizes, done).show) as mailbox:
            busy = _busy(list(fanout.run_stages(todo, draw_stages.drawing(plain, handed, workers, mailbox))))
    if busy is None:
        return None
    logger.info("%s images/s; samplers computed %.0f%% of their time", units.rate(busy["images_per_second"]),
                100 * busy["busy_share"])
    return busy


def _busy(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """images/s of all samplers, and the share of their time that they computed: each from the end of its first chunk, which
    loads and compiles, to the end of its last. Of one that drew a single chunk, that one."""
    by_drawer: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "drawer" in row:
            by_drawer.setdefault(row["drawer"], []).append(row)
    rate = busy = elapsed = 0.0
    for drawn in by_drawer.values():
        first, *later = sorted(drawn, key=lambda row: row["ended"])
        counted, began = (later, first["ended"]) if later else ([first], first["began"])
        seconds = counted[-1]["ended"] - began
        rate += sum(row["num_images"] for row in counted) / seconds
        busy, elapsed = busy + sum(row["busy"] for row in counted), elapsed + seconds
    return {"images_per_second": rate, "busy_share": busy / elapsed} if by_drawer else None
