"""The tables of docs/scale.md: what limits the four jobs on 8, 64 and 512 GPUs, by arithmetic. Nothing here is measured.
All of it in bf16 but for an evaluation's decoding; the presets' own precision is slower (see there).

    python benchmarks/scale_model.py

Operations and bytes are counted from the models; what a GPU, a network and a store give is assumed, in capitals below.
"""

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from mdt_ray import config_io, presets
from mdt_ray.config import PlanConfig
from mdt_ray.data import latents
from mdt_ray.data.order import NUM_SLOTS
from mdt_ray.jobs import plan_train
from mdt_ray.training import cost

GPUS = (8, 64, 512)
GPU_FLOPS = 0.35 * 989e12
"""Of an H100 in bf16, and the share that training reaches (as `mdt-ray plan` assumes)."""
VAE_SHARE = 0.7
"""Of that, what convolutions of an autoencoder reach."""
DECODING_FLOPS = 0.35 * 67e12
"""An evaluation decodes in fp32, whatever its precision: the grey levels are part of what is judged."""
NVLINK, FABRIC, ETHERNET = 300e9, 300e9, 12.5e9
"""Bytes/s of an all-reduce (bus bandwidth): in a node, over eight cards of 400 Gb/s a node, over one of 100 Gb/s a node."""
GPUS_PER_NODE = 8
BACKWARD = 2 / 3
"""Share of a step's two passes in which gradients come, and may travel."""
UPDATE_SECONDS = 11e-3 / 2.8e9
"""Of a step, for each byte of gradients: AdamW and the average of the weights, as measured (benchmarks/RESULTS.md)."""
JPEG_BYTES, JPEG_PER_CORE = 110e3, 500
"""Of a mean picture of ImageNet; pictures/s that a core decodes and scales (benchmarks/RESULTS.md)."""
IMAGES, SAMPLES = 1_281_167, 50_000
START_SECONDS = 60
"""Until all processes run: imports, weights, compilation."""
NUM_LANES, ROWS_PER_GROUP = 64, 128
"""Of the presets. Training reads a row group anew for each stretch of a lane that it is cut by (data/order.py)."""
KEPT_BUSY = 8
"""Chunks a GPU at least, so that the last ones keep no more than about an eighth waiting."""


def table(head: list[str], rows: list[list[str]]) -> str:
    """As Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def number(value: float) -> str:
    """Three digits."""
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def counted(name: str) -> cost.Cost:
    """Of a preset's training in bf16 on GPUs, with latents of 256-pixel images."""
    config = plan_train.with_model(config_io.from_dict(PlanConfig, config_io.to_dict(presets.preset(name).train)))[0]
    return cost.count(config, torch.bfloat16, on_gpu=True)


def train(name: str, images_per_gpu: tuple[int, ...]) -> str:
    """Rate, reading and gradients of a preset by images a GPU and step."""
    found = counted(name)
    rows = []
    for count in images_per_gpu:
        passes = count * found.training_flops / GPU_FLOPS
        step = passes + UPDATE_SECONDS * found.gradient_bytes
        for gpus in GPUS:
            travel = 2 * (gpus - 1) / gpus * found.gradient_bytes
            shares = [step / (step + max(travel / bus - BACKWARD * passes, 0))
                      for bus in ((NVLINK,) if gpus <= GPUS_PER_NODE else (FABRIC, ETHERNET))]
            rate = gpus * count / step * shares[0]
            rows.append([str(gpus), str(count), number(gpus * count), number(1000 * step), number(rate),
                         number(rate * read_bytes(max(NUM_LANES, gpus)) / 1e6),
                         " / ".join(f"{share:.0%}" for share in shares)])
    return table(["GPUs", "images a GPU", "batch", "step, ms", "images/s", "read, MB/s", "of it left by the network"], rows)


def precompute() -> str:
    """Pictures of 256 pixels and their mirror images through Stable Diffusion's encoder."""
    rate = VAE_SHARE * GPU_FLOPS / (2 * vae_flops()["encode"])
    row_bytes = latents.row_bytes((4, 32, 32), flip=True)
    rows = [[str(gpus), number(gpus * rate), number(gpus * rate / JPEG_PER_CORE), number(gpus * rate * JPEG_BYTES / 1e9),
             number(gpus * rate * row_bytes / 1e6), number(IMAGES / (gpus * rate)), number(IMAGES / (gpus * KEPT_BUSY))]
            for gpus in GPUS]
    return table(["GPUs", "images/s", "cores that decode", "read, GB/s", "written, MB/s", "ImageNet in s", "--chunk-size"],
                 rows)


def evaluate(name: str) -> str:
    """50,000 images, 250 guided steps."""
    found = counted(name)
    seconds = drawing(found)
    rows = []
    for gpus in GPUS:
        work = SAMPLES * seconds / gpus
        chunk = SAMPLES // (gpus * KEPT_BUSY)
        rows.append([str(gpus), number(gpus / seconds), number(work / 60), f"{work / (work + START_SECONDS):.0%}",
                     str(chunk)])
    return table(["GPUs", "images/s", "minutes of drawing", "share of the time", "--chunk-size"], rows)


def tune(name: str, steps: int, batch: int, samples: int) -> str:
    """Trials of a GPU each: so many steps, then a judgement by so many guided samples of 250 steps."""
    found = counted(name)
    training = steps * (batch * found.training_flops / GPU_FLOPS + UPDATE_SECONDS * found.gradient_bytes)
    seconds = START_SECONDS + training + samples * drawing(found)
    read = batch * steps / training * read_bytes(NUM_LANES)
    rows = [[str(gpus), number(seconds / 3600), number(gpus * 86400 / seconds), number(gpus * read / 1e9)] for gpus in GPUS]
    return table(["GPUs and trials at a time", "hours a trial", "trials a day", "read, GB/s"], rows)


def read_bytes(lanes: int) -> float:
    """For each image of an epoch: its row, and what is read again of groups that lanes cut."""
    return latents.row_bytes((4, 32, 32), flip=True) * (1 + NUM_SLOTS * lanes / (IMAGES / ROWS_PER_GROUP))


def drawing(found: cost.Cost) -> float:
    """Seconds an image on a GPU: 250 guided steps, and its decoding."""
    return 2 * 250 * found.inference_flops / GPU_FLOPS + vae_flops()["decode"] / (VAE_SHARE * DECODING_FLOPS)


def vae_flops() -> dict[str, int]:
    """Of an image of 256 pixels, by direction."""
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                            block_out_channels=[128, 256, 512, 512], layers_per_block=2)
        found = {}
        for name, call, shape in (("encode", vae.encode, (1, 3, 256, 256)), ("decode", vae.decode, (1, 4, 32, 32))):
            with FlopCounterMode(display=False) as counter:
                call(torch.empty(shape))
            found[name] = counter.get_total_flops()
    return found


if __name__ == "__main__":
    for title, text in (("precompute", precompute()), ("train XL/2", train("imagenet256-xl-2", (4, 16, 64))),
                        ("train S/2", train("imagenet256-s-2", (16, 128))), ("evaluate XL/2", evaluate("imagenet256-xl-2")),
                        ("tune S/2", tune("imagenet256-s-2", 100_000, 256, 10_000))):
        print(f"{title}\n\n{text}\n")
