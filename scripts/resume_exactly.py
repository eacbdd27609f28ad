"""Shows what training promises of its order, under plain DDP over gloo: no Ray.

    python scripts/resume_exactly.py --ranks 1 2 3 4

For each number of ranks, a small model is trained 20 steps straight; and once more, where rank 0 is killed (SIGKILL) at step
13 and new processes go on from the checkpoint of step 10. Both must agree bit for bit: losses, weights, averaged weights,
optimiser state, the images of each step. Between numbers of ranks, also where it changes at the resume or where gradients
are accumulated, images must be the same and losses agree to 1e-5. Exit code 0 if all of it holds.
"""

import argparse
import dataclasses
import json
import os
import signal
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
from mdt_ray.data.loader import Loader
from mdt_ray.training import contract
from mdt_ray.training import run as training
from mdt_ray.training.meters import MACHINE_COLUMNS

NUM_STEPS, KILL_AT = 20, 13
FILES = (*(f"{name}/diffusion_pytorch_model.safetensors" for name in ("model", "ema", "ema_0.5", "ema_power_0.050")),
         "optimizer.pt")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    counts = parser.parse_args().ranks
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_latents(folder / "latents")
        faults, base = [], f"straight-{counts[0]}"
        for ranks in counts:
            launch(folder, f"straight-{ranks}", ranks)
            launch(folder, f"killed-{ranks}", ranks, kill_at=KILL_AT)
            launch(folder, f"killed-{ranks}", ranks)
            faults += differences(folder, f"straight-{ranks}", f"killed-{ranks}", exactly=True)
            if ranks != counts[0]:
                faults += differences(folder, base, f"straight-{ranks}", exactly=False)
        launch(folder, "other-ranks", counts[0], kill_at=KILL_AT)
        launch(folder, "other-ranks", counts[-1])
        launch(folder, "accumulated", counts[-1], accumulation=2)
        faults += differences(folder, base, "other-ranks", exactly=False)
        faults += differences(folder, base, "accumulated", exactly=False)
    print("\n".join(faults) or f"{counts} ranks: 20 steps = 13 + SIGKILL + resume, bit for bit; the same images and losses "
          "for any number of ranks, changed at a resume or with gradients accumulated")
    return 1 if faults else 0


def launch(folder: Path, name: str, ranks: int, kill_at: int | None = None, accumulation: int = 1) -> None:
    """Train as so many processes, which forked from this one need not import anything."""
    config = TrainConfig(
        latents=str(folder / "latents"), output=str(folder / name), batch_size=32, num_lanes=8, num_steps=NUM_STEPS,
        model=ModelConfig(patch_size=1, hidden_size=32, depth=3, num_heads=2, decode_layer=1), precision="fp32", flip=True,
        optim=OptimConfig(lr=1e-3, clip_norm=1.0),
        ema=EmaConfig(decay=0.99, warmup=True, more_decays=(0.5,), power_stds=(0.05,), snapshot_every_steps=4),
        log_every_steps=1, checkpoint_every_steps=5, validate_every_steps=5, accumulation=accumulation)
    (folder / name).mkdir(exist_ok=True)
    rendezvous = folder / f"{name}-{kill_at}.rendezvous"
    context = mp.start_processes(run, (ranks, config_io.to_dict(config), str(rendezvous), kill_at), ranks, join=False,
                                 start_method="fork")
    for process in context.processes:
        process.join()
    codes = [process.exitcode for process in context.processes]
    assert codes == [0] * ranks if kill_at is None else codes[0] == -signal.SIGKILL, f"{name}: exit codes {codes}"


def run(rank: int, ranks: int, plain: dict, rendezvous: str, kill_at: int | None) -> None:
    torch.set_num_threads(1)
    if kill_at is not None:  # the ranks that are left complain about the lost one
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    config = config_io.from_dict(TrainConfig, plain)
    manifest = latents.open_manifest(config.latents)
    config = dataclasses.replace(config, model=contract.resolve_model(config.model, manifest))

    class RecordingLoader(Loader):
        """Notes the images of every step before it is trained on."""

        def batches(self, first_step, attempt=0):
            with open(Path(config.output, f"images-{rank}.jsonl"), "a") as file:
                for parts in super().batches(first_step, attempt):
                    found = [image for part in parts for image in part.images.tolist()]
                    print(json.dumps({"step": parts[0].step, "images": found}), file=file, flush=True)
                    yield parts

    training.Loader = RecordingLoader

    def report(row: dict) -> None:
        if row["step"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    training.run_rank(config, manifest, {"config": plain}, rank=rank, world_size=ranks, report=report)
    if ranks > 1:
        dist.destroy_process_group()


def write_latents(folder: Path) -> None:
    """130 images, 13 of them held out, so that batches of 32 span epochs."""
    rng = np.random.default_rng(0)
    moments = np.abs(rng.normal(size=(2, 130, 2, 4, 4, 4)))
    table = latents.encode_table([str(i) for i in range(130)], [i % 10 for i in range(130)], *moments, 0.1, {})
    file = latents.write_file(str(folder), "chunk-00000.parquet", table, rows_per_group=16)
    vae = {"path": "digits", "revision": None, "scale": 1.0, "shift": 0.0, "weights_hash": "none"}
    latents.write_manifest(str(folder), latents.Manifest(
        identity="example", shape=[4, 4, 4], image_size=32, vae=vae, num_classes=10, class_counts=[13] * 10,
        class_names=[str(c) for c in range(10)], flip=True, files=[file]))


def differences(folder: Path, one: str, two: str, exactly: bool) -> list[str]:
    """What differs between two runs, times aside."""
    a, b = (Path(checkpoints.latest(str(folder / name))) for name in (one, two))
    found = []
    if exactly:
        found += [f"{one} and {two}: {name} differs" for name in FILES if (a / name).read_bytes() != (b / name).read_bytes()]
    rows = [[{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in
             checkpoints.read_metrics(str(checkpoint / "metrics.parquet"))] for checkpoint in (a, b)]
    if len(rows[0]) != NUM_STEPS or [row.keys() for row in rows[0]] != [row.keys() for row in rows[1]]:
        return [*found, f"{one} and {two}: other rows of metrics"]
    far = [(x["step"], name) for x, y in zip(*rows, strict=True) for name in x
           if (x[name] != y[name] if exactly else abs(x[name] - y[name]) > 1e-5 * max(1.0, abs(x[name])))]
    if far:
        found.append(f"{one} and {two}: metrics differ, first {far[0][1]} at step {far[0][0]}")
    if images(folder / one) != images(folder / two):
        found.append(f"{one} and {two}: other images")
    return found


def images(output: Path) -> dict[int, list[int]]:
    """Images of each step over all ranks, as whichever process came last had them."""
    steps: dict[int, dict[str, list[int]]] = {}
    for path in output.glob("images-*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(record["step"], {})[path.name] = record["images"]
    return {step: sorted(image for rank in found.values() for image in rank) for step, found in steps.items()}


if __name__ == "__main__":
    sys.exit(main())
