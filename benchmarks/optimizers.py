"""Learning curves of AdamW, Adan and Muon on the embedded handwritten digits, each at its best learning rate.

    python benchmarks/optimizers.py [--quick] [--picture docs/optimizers.png]
    python benchmarks/optimizers.py --times     # how long a step of each takes for MDT-S/2, and nothing else

The digits preset's model, batch, warm-up and clipping, a cosine to the end of the run, without Ray. The best rate has the
lowest loss of held-out images with fixed noise (of the averaged weights) at the end; it is run again with other seeds.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from forward import medians

from mdt_ray.config import OptimConfig, TrainConfig
from mdt_ray.jobs.train import prepare
from mdt_ray.models import MDT
from mdt_ray.presets import preset
from mdt_ray.training.optim import build_optimizer
from mdt_ray.training.run import run_rank

RATES = {"adamw": (8e-3, 1.6e-2, 3.2e-2), "adan": (1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1), "muon": (4e-3, 8e-3, 1.6e-2)}
Curve = list[tuple[int, float]]


def curve(base: TrainConfig, folder: Path, name: str, lr: float, seed: int) -> Curve:
    """Validation loss by step of one run."""
    config = dataclasses.replace(base, output=str(folder / f"{name}-{lr:g}-{seed}"), seed=seed,
                                 optim=dataclasses.replace(base.optim, name=name, lr=lr))
    state = run_rank(*prepare(config))
    return [(row["step"], row["val_loss"]) for row in state.history if row.get("val_loss") is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rates, short runs, one seed: shows that it works")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--picture", type=Path, help="PNG to draw the curves to")
    arguments = parser.parse_args()
    if arguments.times:
        return times()
    steps, seeds = (100, 1) if arguments.quick else (600, 3)
    digits = preset("digits")
    best: dict[str, tuple[float, list[Curve]]] = {}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        subprocess.run([sys.executable, "-m", "mdt_ray.cli", "precompute", "digits", "--output", f"{folder}/latents"],
                       check=True)
        base = dataclasses.replace(
            digits.train, latents=f"{folder}/latents", num_steps=steps, validate_every_steps=50, keep_every_steps=0,
            checkpoint_every_steps=10**6, workers=dataclasses.replace(digits.train.workers, num_workers=1),
            optim=dataclasses.replace(digits.train.optim, schedule_steps=steps, warmup_steps=min(100, steps // 5)))
        for name, rates in RATES.items():
            found = {}
            for lr in rates[:2] if arguments.quick else rates:
                found[lr] = curve(base, folder, name, lr, 0)
                print(f"{name:<6} lr {lr:<7g} val_loss {found[lr][-1][1]:.4f}", flush=True)
            lr = min(found, key=lambda lr: found[lr][-1][1])
            if lr in (rates[0], rates[-1]):
                print(f"{name}: its best rate is at the edge of those tried")
            # Other seeds than the one that chose the rate.
            best[name] = lr, [curve(base, folder, name, lr, seed) for seed in range(1, 1 + seeds)]
    ends = {name: [values[-1][1] for values in curves] for name, (_, curves) in best.items()}
    for name, (lr, _) in best.items():
        print(f"{name:<6} lr {lr:<7g} val_loss of {seeds} seeds {statistics.mean(ends[name]):.4f} "
              f"({min(ends[name]):.4f} to {max(ends[name]):.4f})")
    if arguments.picture:
        draw(best, arguments.picture)
    target = statistics.mean(ends["adamw"])
    figures = {f"val_loss_{name}": round(statistics.mean(values), 4) for name, values in ends.items()}
    for name in ("adan", "muon"):
        rows = zip(*best[name][1], strict=True)  # (step, loss) of all seeds
        reached = (row[0][0] for row in rows if statistics.mean(loss for _, loss in row) <= target)
        figures[f"steps_of_{name}_for_adamws_end"] = next(reached, None)
    print(json.dumps({"name": "optimizers", "steps": steps, "figures": figures}))


def times() -> None:
    """Milliseconds of the optimisers' own steps, without forward and backward passes."""
    steps = {}
    for name, compiled in (("adamw", False), ("adan", False), ("adan", True), ("muon", False)):
        model = MDT()
        optimizer = build_optimizer(model, OptimConfig(name=name), compiled)
        optimizer.found_inf = torch.zeros(())
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        steps[name + " compiled" * compiled] = optimizer.step
    found = {name: round(seconds * 1e3) for name, seconds in medians(steps, 9, lambda: None).items()}
    print(json.dumps({"name": "optimizers", "milliseconds": found}))


def draw(best: dict[str, tuple[float, list[Curve]]], path: Path) -> None:
    """Mean curve of each optimiser, and the range of its seeds."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (lr, curves) in best.items():
        steps = [step for step, _ in curves[0]]
        by_step = [[value for _, value in points] for points in zip(*curves, strict=True)]
        line, = axes.plot(steps, [statistics.mean(values) for values in by_step], label=f"{name}, lr {lr:g}")
        axes.fill_between(steps, [min(v) for v in by_step], [max(v) for v in by_step], color=line.get_color(), alpha=0.2)
    axes.set(xlabel="step", ylabel="validation loss (fixed noise)", yscale="log",
             title=f"handwritten digits: mean and range of {len(curves)} seeds")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
