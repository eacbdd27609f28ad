"""What Ray Train costs: the steps of `mdt-ray train` against those of a bare `torchrun` of the same loop.

    python benchmarks/ray_overhead.py [--quick]

The digits preset (0.1 to 0.2 s a step: an overhead of milliseconds would show), workers of one thread, launches in turn, a
row of metrics every 10 steps. Compared are the medians of these rows' rates, without those of the first 30 steps; starting
up is not in them. Two workers take all of two cores, so that there Ray's own processes have to share.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mdt_ray import checkpoints, config_io
from mdt_ray.config import TrainConfig
from mdt_ray.jobs.train import prepare
from mdt_ray.presets import preset
from mdt_ray.training.run import run_rank

WARM_UP = 30


def bare(settings: str) -> None:
    """One rank of torchrun."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    config, manifest, run = prepare(config_io.load_file(TrainConfig, settings))
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        dist.init_process_group("gloo")
    run_rank(config, manifest, run, rank=int(os.environ["RANK"]), world_size=world_size)


def rates(config: TrainConfig, folder: Path, kind: str, number: int) -> list[float]:
    """Images/s of every row of a whole run."""
    config = dataclasses.replace(config, output=str(folder / f"{kind}-{config.workers.num_workers}-{number}"))
    settings = folder / "settings.json"
    settings.write_text(json.dumps(config_io.to_dict(config)))
    launcher = (["-m", "mdt_ray.cli", "train", "--config", str(settings)] if kind == "ray" else
                ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.workers.num_workers}", __file__,
                 "--rank-of", str(settings)])
    done = subprocess.run([sys.executable, *launcher], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    rows = checkpoints.read_metrics(f"{config.output}/metrics.parquet")
    return [row["images_per_second"] for row in rows if row["step"] > WARM_UP]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of short runs, one worker only")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        return bare(arguments.rank_of)
    digits = preset("digits")
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "mdt_ray.cli", "precompute", "digits", "--output", f"{folder}/latents"],
                       check=True)
        steps, rounds = (90, 1) if arguments.quick else (230, 3)
        for num_workers in (1,) if arguments.quick else (1, 2):
            config = dataclasses.replace(
                digits.train, latents=f"{folder}/latents", num_steps=steps, log_every_steps=10, validate_every_steps=0,
                checkpoint_every_steps=10**6, workers=dataclasses.replace(digits.train.workers, num_workers=num_workers))
            found: dict[str, list[float]] = {"bare": [], "ray": []}
            for number in range(rounds):
                for kind in found:
                    found[kind] += rates(config, folder, kind, number)
            median = {kind: statistics.median(values) for kind, values in found.items()}
            print(f"{num_workers} workers: " + ", ".join(f"{kind} {value:.1f} images/s" for kind, value in median.items()))
            suffix = "" if num_workers == 1 else f"_{num_workers}_workers"
            figures[f"ray_overhead_share{suffix}"] = 1 - median["ray"] / median["bare"]
    figures = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({"name": "ray_overhead", "machine": platform.machine(), "figures": figures}))


if __name__ == "__main__":
    main()
