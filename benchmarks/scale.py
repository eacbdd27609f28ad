"""What the drivers cost where there is much to do: everything real but the work itself, which is none.

    python benchmarks/scale.py [--quick] [--only chunks files sweep]

`chunks`: the pool of actors of `precompute` and `evaluate` with 64 actors, which only wait, over 1,000 chunks; the seconds
between two chunks of one actor beyond its wait are what scheduling costs. Actors reserve next to nothing and share this
machine's processors, so that 64 processes start on two cores: starting up is a figure of its own.
`files`: a folder of 20,000 files of latents: writing and opening its manifest, and what a restart reads of finished chunks;
and listing 20,000 pictures in folders of their classes; on this machine's disk, and by HTTP from moto's S3 server, which
answers some hundred requests a second.
`sweep`: `tune` over 200 trials that end at once.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' store

from mdt_ray import presets, storage
from mdt_ray.config import WorkersConfig
from mdt_ray.data import latents, listings, sources
from mdt_ray.data.latents import LatentFile, Manifest
from mdt_ray.jobs import fanout, precompute, search, session, tune
from tests import s3

WAIT_SECONDS = 2.0
"""Of an actor on a chunk. (Real ones take 10 s to some minutes.)"""


class Wait:
    """An actor's work that takes no processor."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        began = time.time()
        time.sleep(self.seconds)
        return item | {"process": os.getpid(), "began": began, "ended": time.time()}


def chunks(quick: bool) -> dict[str, float]:
    """1,000 chunks over 64 actors."""
    count, actors = (100, 4) if quick else (1000, 64)
    session.start()
    workers = WorkersConfig(num_workers=actors, cpus_per_worker=0.02)
    started = time.time()
    wait = WAIT_SECONDS / 4 if quick else WAIT_SECONDS
    rows = list(fanout.run_chunks([{"chunk": k} for k in range(count)], Wait, (wait,), workers))
    ended = time.time()
    assert sorted(row["chunk"] for row in rows) == list(range(count))
    by_process: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["began"]):
        by_process.setdefault(row["process"], []).append(row)
    assert len(by_process) == actors
    # From when all are there; before, the chunks of those that are late lie with those that are not.
    full, last = max(mine[0]["began"] for mine in by_process.values()), max(row["ended"] for row in rows)
    gaps = [after["began"] - before["ended"] for mine in by_process.values()
            for before, after in itertools.pairwise(mine) if before["ended"] >= full]
    busy = sum(max(row["ended"] - max(row["began"], full), 0) for row in rows) / (actors * (last - full))
    return {"actors": actors, "chunks": count, "first_chunk_begins_after_seconds": min(r["began"] for r in rows) - started,
            "all_actors_after_seconds": full - started,
            "gap_between_chunks_ms_median": 1000 * statistics.median(gaps),
            "gap_between_chunks_ms_p99": 1000 * statistics.quantiles(gaps, n=100)[98],
            "share_of_actors_time_busy": busy, "seconds_from_last_chunk_to_the_end": ended - last}


def files(quick: bool) -> dict[str, float]:
    """20,000 files on a disk, and a tenth of them in an object store."""
    count = 2000 if quick else 20_000
    figures: dict[str, float] = {"files": count}
    with tempfile.TemporaryDirectory() as folder:
        figures |= _folder_of(folder, count, "")
    os.environ.update(s3.KEYS)
    with s3.serve() as store:
        figures |= {"objects": count // 10} | _folder_of(store.uri("latents"), count // 10, "s3_")
    return figures


def _folder_of(folder: str, count: int, prefix: str) -> dict[str, float]:
    """Seconds of what a driver does with so many files."""
    data = b"x" * 64
    listed = [LatentFile(name=latents.file_name(k), num_rows=4096, num_bytes=len(data), sha256=storage.sha256(data),
                         rows_per_group=128, validation_rows=list(range(0, 4096, 100))) for k in range(count)]
    manifest = Manifest(identity="x", shape=[4, 32, 32], image_size=256, vae={}, num_classes=1, class_counts=[4096 * count],
                        class_names=["x"], flip=False, files=listed)
    sums = {"count": 1, "sum": [0.0] * 4, "sum_of_squares": [1.0] * 4}

    def write(k: int) -> None:
        storage.write_bytes(storage.join(folder, listed[k].name), data)
        storage.write_json(precompute.entry_uri(folder, k), {
            "run": "x", "file": dataclasses.asdict(listed[k]), "class_counts": {"0": 4096}, "sums": sums, "rejected": []})

    def seconds(do) -> float:
        started = time.perf_counter()
        do()
        return time.perf_counter() - started

    with ThreadPoolExecutor(16) as pool:
        written = seconds(lambda: list(pool.map(write, range(count))))
        list(pool.map(lambda k: storage.write_bytes(storage.join(folder, "pictures", f"{k % 100:02d}", f"{k}.png"), data),
                      range(count)))
    found: list[Any] = []
    figures = {"write_files": written, "write_manifest": seconds(lambda: latents.write_manifest(folder, manifest)),
               "open_manifest": seconds(lambda: found.append(latents.open_manifest(folder))),
               "restart_reads_chunks": seconds(lambda: found.append(precompute.finished_entries(folder, "x", count))),
               "list_pictures": seconds(lambda: found.append(listings.list_images(sources.open_source(
                   storage.join(folder, "pictures")))))}
    assert found[0] == manifest
    assert len(found[1]) == count
    assert found[2].table.num_rows == count
    return {f"{prefix}{name}_seconds": value for name, value in figures.items()}


def sweep(quick: bool) -> dict[str, float]:
    """200 trials of the digits' space, whose metrics are made up and take no time."""
    count = 20 if quick else 200
    digits = presets.preset("digits")

    def at_once(params: dict[str, Any], config: Any, groups: Any, claim: Any, channel: Any) -> None:
        for t in search._trials_of(params, config, groups):
            result = t.end("finished", metrics={metric: float(t.point["optim.lr"])}, train_seconds=1.0, num_parameters=1,
                           seconds=1.0, curve=[{"step": t.train.num_steps, "loss": 1.0}])
            search._report_end(result)

    with tempfile.TemporaryDirectory() as folder:
        precompute.precompute(dataclasses.replace(digits.precompute, output=f"{folder}/latents"))
        space = Path(folder, "many.py")
        space.write_text('metric = "fid"\n\n\ndef space():\n'
                         f'    return {{"optim.lr": [round(1e-4 + k * 1e-6, 7) for k in range({count})]}}\n')
        config = dataclasses.replace(
            digits.tune, space=str(space), output=f"{folder}/sweep", search="grid", scheduler="none",
            train=dataclasses.replace(digits.tune.train, latents=f"{folder}/latents"))
        metric = tune.objective(config, tune.load_space(config.space))
        search._run, tune._write_report = at_once, lambda *arguments: None  # its page needs pictures
        session.start(dashboard=True)
        started = time.perf_counter()
        tune.tune(config)
        first = time.perf_counter() - started
        started = time.perf_counter()
        tune.tune(config)
        second = time.perf_counter() - started
    return {"trials": count, "sweep_seconds": first, "sweep_seconds_per_trial": first / count,
            "finished_sweep_opens_in_seconds": second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of it")
    parser.add_argument("--only", nargs="+", choices=("chunks", "files", "sweep"), default=["chunks", "files", "sweep"])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    figures: dict[str, float] = {}
    for name in arguments.only:
        found = {"chunks": chunks, "files": files, "sweep": sweep}[name](arguments.quick)
        print(" ".join(f"{key}={value:.4g}" for key, value in found.items()), flush=True)
        figures |= {key: round(value, 4) for key, value in found.items()}
    print(json.dumps({"name": "scale", "machine": platform.machine(), "figures": figures}))


if __name__ == "__main__":
    main()
