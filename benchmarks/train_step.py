"""Speed of a training step of MDT: ours (the real loop, without Ray) against the published way in eager fp32.

    python benchmarks/train_step.py [--quick]

All in one process, in turns, medians, ours compiled and eager. All start from the same weights, and the losses of the first
batch must agree. The batch lies ready in memory (benchmarks/loader.py measures reading; train_sweep.py is for GPUs).
"""

import argparse
import dataclasses
import itertools
import json
import platform
from collections.abc import Callable

import torch
from forward import medians
from published_step import PublishedStep

from mdt_ray.autocast import autocast_dtype
from mdt_ray.config import TrainConfig
from mdt_ray.data.loader import Batch
from mdt_ray.models.compiling import compile_blocks
from mdt_ray.presets import preset
from mdt_ray.training import loop
from mdt_ray.training.ema import build_averages
from mdt_ray.training.optim import build_optimizer
from mdt_ray.training.state import TrainState
from mdt_ray.training.step import TrainingStep, build_model

AGREEMENT = {"fp32": 1e-5, "bf16": 1e-2}
"""Allowed relative difference of a batch's loss from the published step's."""


def settings(size: str, batch_size: int, **changes) -> TrainConfig:
    """A preset's for steps alone: no rows, checkpoints or validation."""
    published = preset(f"imagenet256-{size}-2").train
    return dataclasses.replace(
        published, batch_size=batch_size, num_lanes=1, log_every_steps=10**9, validate_every_steps=0,
        workers=dataclasses.replace(published.workers, num_workers=1), checkpoint_every_steps=10**9,
        model=dataclasses.replace(published.model, input_size=32, in_channels=4), **changes)


def random_batch(config: TrainConfig, device: torch.device) -> Batch:
    """Random numbers of the distributions that training sees."""
    model, number = config.model, config.batch_size
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(model.num_classes, (number,), generator=generator)
    x_0, eps_full, eps_masked = torch.randn(3, number, model.in_channels, model.input_size, model.input_size,
                                            generator=generator)
    return Batch(step=0, images=labels, x_0=x_0, t=torch.randint(1000, (number,), generator=generator), eps_full=eps_full,
                 eps_masked=eps_masked, y_full=labels, y_masked=labels,
                 mask_noise=torch.rand(number, (model.input_size // model.patch_size) ** 2, generator=generator),
                 mask_ratio_draw=0.0).to(device)


class Ours:
    """The loop of `mdt-ray train` on one batch, again and again."""

    def __init__(self, config: TrainConfig, initial: dict, device: torch.device):
        self.config, self.device = config, device
        model = build_model(config.model, config.loss.passes).to(device)
        model.load_state_dict(initial, strict=False)  # (without a masked pass there are no parts for it)
        if config.compile:
            compile_blocks(model)
        averages = build_averages(model, config.ema)
        self.state = TrainState(model=model, ema=averages.pop("ema"), more_ema=averages,
                                optimizer=build_optimizer(model, config.optim, config.compile))
        self.step = TrainingStep(model, config.loss, autocast_dtype(config.precision, device))

    def run(self, batch: Batch, num_steps: int) -> None:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.config.precision == "tf32"
        self.state.step = max(self.state.step, 1)  # no checkpoint of step 0
        config = dataclasses.replace(self.config, num_steps=self.state.step + num_steps)
        loop.train(self.state, self.step, itertools.repeat((batch,)), config, device=self.device,
                   report=lambda row: None, save=lambda *_: None)

    def loss(self, batch: Batch) -> float:
        losses = self.step(batch)
        return (losses["full"] + losses["masked"]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, about a minute on 2 cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="s", choices=("s", "b", "l", "xl"))
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    base = settings(arguments.size, arguments.batch_size)
    batch = random_batch(base, device)
    torch.manual_seed(0)
    model = build_model(base.model, base.loss.passes).to(device)
    for parameter in model.parameters():  # (a fresh one gives zeros)
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    initial = model.state_dict()
    baseline = PublishedStep(model, base.loss.mask_ratio)
    expected = baseline.losses(batch).mean().item()
    functions: dict[str, Callable] = {"published": lambda: baseline(batch)}
    for precision in ("fp32", "bf16"):
        for name, compiled in ((precision, True), (f"{precision} eager", False)):
            ours = Ours(dataclasses.replace(base, precision=precision, compile=compiled), initial, device)
            found = ours.loss(batch)
            assert abs(found - expected) < AGREEMENT[precision] * expected, (name, found, expected)
            functions[name] = lambda ours=ours: ours.run(batch, 1)
        for passes in ("full", "masked"):
            loss = dataclasses.replace(base.loss, passes=passes)
            one = Ours(dataclasses.replace(base, precision=precision, loss=loss), initial, device)
            functions[f"{precision} {passes}"] = lambda one=one: one.run(batch, 1)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = medians(functions, 3 if arguments.quick else 15, synchronise)
    figures = {}
    for precision in ("fp32", "bf16"):
        figures[f"speedup_{precision}_vs_eager_fp32"] = seconds["published"] / seconds[precision]
        figures[f"speedup_{precision}_without_compile"] = seconds["published"] / seconds[f"{precision} eager"]
        full, masked = seconds[f"{precision} full"], seconds[f"{precision} masked"]
        figures["masked_pass_share" + ("" if precision == "fp32" else "_bf16")] = masked / (full + masked)
    print("\n".join(f"{name:<12} {value * 1e3:8.0f} ms  {arguments.batch_size / value:8.2f} images/s"
                    for name, value in seconds.items()))
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    print(json.dumps({"name": "train_step", "machine": machine, "figures": {k: round(v, 3) for k, v in figures.items()}}))


if __name__ == "__main__":
    main()
