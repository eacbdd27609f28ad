"""Shows that resume equals a straight run, bit for bit, under plain DDP over gloo: no Ray.

    python scripts/resume_exactly.py --ranks 3

Trains a small model 20 steps straight, then 10 steps, a new set of processes, and 10 more; compares losses, weights,
averaged weights and optimiser state. Exit code 0 if all are equal.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mdt_ray import checkpoints, config_io
from mdt_ray.config import EmaConfig, ModelConfig, OptimConfig, TrainConfig
from mdt_ray.data import latents
from mdt_ray.training.run import resolve_model, run_rank


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=3)
    ranks = parser.parse_args().ranks
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_latents(folder / "latents")
        launch(folder, "straight", 20, ranks)
        launch(folder, "resumed", 10, ranks)
        launch(folder, "resumed", 20, ranks)
        differences = compare(folder / "straight", folder / "resumed")
    print("\n".join(differences) or f"{ranks} ranks: 20 steps = 10 + resume + 10, bit for bit")
    return 1 if differences else 0


def launch(folder: Path, name: str, num_steps: int, ranks: int) -> None:
    config = TrainConfig(
        latents=str(folder / "latents"), output=str(folder / name), batch_size=24, num_lanes=8, num_steps=num_steps,
        model=ModelConfig(patch_size=1, hidden_size=32, depth=3, num_heads=2, decode_layer=1),
        optim=OptimConfig(lr=1e-3, clip_norm=1.0), ema=EmaConfig(decay=0.99, warmup=True), log_every_steps=1,
        checkpoint_every_steps=5)
    mp.start_processes(run, (ranks, config_io.to_dict(config), str(folder / f"{name}-{num_steps}.rendezvous")), ranks,
                       start_method="spawn")


def run(rank: int, ranks: int, plain: dict, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    config = config_io.from_dict(TrainConfig, plain)
    manifest = latents.open_manifest(config.latents)
    config = config_io.override(config, {"model": config_io.to_dict(resolve_model(config.model, manifest))})
    run_rank(config, manifest, {"config": plain}, rank=rank, world_size=ranks)
    dist.destroy_process_group()


def write_latents(folder: Path) -> None:
    """130 images, so that batches of 24 span epochs."""
    rng = np.random.default_rng(0)
    moments = np.abs(rng.normal(size=(130, 2, 4, 4, 4)))
    table = latents.encode_table([str(i) for i in range(130)], [i % 10 for i in range(130)], moments, None, 0.0, {})
    file = latents.write_file(str(folder), "chunk-00000.parquet", table, rows_per_group=16)
    vae = {"path": "digits", "revision": None, "scale": 1.0, "shift": 0.0, "weights_hash": "none"}
    latents.write_manifest(str(folder), latents.Manifest(
        identity="example", shape=[4, 4, 4], image_size=32, vae=vae, num_classes=10, class_counts=[13] * 10,
        class_names=[str(c) for c in range(10)], flip=False, files=[file]))


def compare(straight: Path, resumed: Path) -> list[str]:
    """What differs between the two last checkpoints, times aside."""
    a, b = (Path(checkpoints.latest(str(output))) for output in (straight, resumed))
    differences = []
    for name in ("model/diffusion_pytorch_model.safetensors", "ema/diffusion_pytorch_model.safetensors", "optimizer.pt"):
        if (a / name).read_bytes() != (b / name).read_bytes():
            differences.append(f"{name} differs")
    rows = [[{k: v for k, v in row.items() if k != "images_per_second"} for row in
             checkpoints.read_metrics(str(folder / "metrics.parquet"))] for folder in (a, b)]
    if json.dumps(rows[0]) != json.dumps(rows[1]):
        differences.append("losses differ")
    return differences


if __name__ == "__main__":
    sys.exit(main())
