"""What a worker of a training run does between being started and the loop. No Ray: any launcher may call `run_rank`."""

import copy
import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mdt_ray import checkpoints, config_io, storage
from mdt_ray.config import ModelConfig, TrainConfig
from mdt_ray.data.latents import Manifest
from mdt_ray.data.loader import Loader, LoaderConfig
from mdt_ray.inference.convert import load_any, origin_of
from mdt_ray.models.transfer import transfer
from mdt_ray.training import loop
from mdt_ray.training import state as states
from mdt_ray.training.optim import build_optimizer
from mdt_ray.training.state import TrainState
from mdt_ray.training.step import TrainingStep, build_model

logger = logging.getLogger(__name__)
METRICS = "metrics.parquet"
INIT_FROM = "init_from.txt"
"""In a training output: what was taken from the weights that it started from, and what is new."""


def resolve_model(config: ModelConfig, manifest: Manifest) -> ModelConfig:
    """`config` with what it leaves open taken from the latents. Raises ValueError where the two disagree."""
    found = {"input_size": manifest.shape[1], "in_channels": manifest.shape[0], "num_classes": manifest.num_classes}
    if manifest.shape[1] != manifest.shape[2]:
        raise ValueError(f"latents have shape {tuple(manifest.shape)}: must be square; crop when precomputing")
    for name, value in found.items():
        asked = getattr(config, name)
        if asked is None or asked == value or (name == "num_classes" and asked == 0):
            continue  # (0 classes: an unconditional model)
        if name == "num_classes" and asked > value:
            continue  # a small sample of a data set may lack its last classes
        raise ValueError(f"model.{name} = {asked}: the latents have {value}; "
                         "leave it out to take theirs, or precompute others")
    missing = {name: value for name, value in found.items() if getattr(config, name) is None}
    return config_io.override(config, missing, where="model")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bf16, or None for float32. `auto` takes bf16 where the hardware multiplies it natively."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def checkpoint_facts(config: TrainConfig, manifest: Manifest) -> dict:
    """What sampling needs to know beside the weights."""
    return {"vae": manifest.vae, "image_size": manifest.image_size, "latent_shape": manifest.shape,
            "class_names": manifest.class_names, "num_classes": config.model.num_classes}


def run_rank(config: TrainConfig, manifest: Manifest, run: dict, *, rank: int = 0, world_size: int = 1,
             device: torch.device | str = "cpu", report: Callable[[dict], None] = lambda row: None,
             may_write: Callable[[], bool] = lambda: True) -> TrainState:
    """Train as one rank, from the newest checkpoint of config.output or from the start, to config.num_steps.

    Args:
        config: resolved, its model complete.
        run: content of run.json for the checkpoints.
        rank, world_size: of a torch.distributed group that exists already where world_size > 1.
        report: gets every row of metrics, on rank 0 only.
        may_write: asked before a checkpoint is written, on rank 0 only; False ends the run.
    Raises ValueError for bad latents or checkpoints, TrainingDiverged if the loss stays non-finite, RuntimeError if
    another run took over the output.
    """
    device = torch.device(device)
    torch.manual_seed(config.seed)  # the weights' initial values; every other draw has a generator of its own
    model = build_model(config.model, config.loss.passes).train().to(device)
    found, started_from = checkpoints.latest(config.output), None
    if config.init_from and not found:
        done, started_from = transfer(model, load_any(config.init_from)), origin_of(config.init_from)
        if rank == 0:
            text = "\n  ".join([f"started from {config.init_from}:", *done.lines()])
            logger.info("%s", text)
            storage.write_bytes(storage.join(config.output, INIT_FROM), f"{text}\n".encode())
    state = TrainState(model=model, ema=copy.deepcopy(model).eval().requires_grad_(False),
                       optimizer=build_optimizer(model, config.optim))
    if found:
        states.restore(state, found)
        started_from = storage.read_json(storage.join(found, "state.json")).get("started_from")
    dtype = autocast_dtype(config.precision, device)
    step = TrainingStep(model, config.loss, dtype)
    module = DistributedDataParallel(step) if world_size > 1 else step
    side = config.model.input_size // config.model.patch_size
    loader_config = LoaderConfig(batch_size=config.batch_size, num_lanes=config.num_lanes, seed=config.seed,
                                 num_classes=config.model.num_classes, num_tokens=side * side, flip=config.flip,
                                 class_dropout_prob=config.model.class_dropout_prob)
    facts = checkpoint_facts(config, manifest) | ({"started_from": started_from} if started_from else {})

    def save(state: TrainState) -> None:
        if rank == 0:
            if not may_write():
                raise RuntimeError(f"{config.output} was taken over by another run; this one stops")
            states.save_checkpoint(state, config.output, run, facts)
            checkpoints.write_metrics(storage.join(config.output, METRICS), state.history)
            states.prune_checkpoints(config.output, config.keep_last, config.keep_every_steps)
        if world_size > 1:
            dist.barrier()  # a checkpoint counts when every rank got there

    if rank == 0:
        storage.clear_leftovers(storage.join(config.output, checkpoints.CHECKPOINTS))
        logger.info("rank 0 of %d: %d training images, %d lanes, %s, %d threads, from step %d", world_size,
                    manifest.num_train, config.num_lanes, dtype or torch.float32, torch.get_num_threads(), state.step)
    with Loader(config.latents, manifest, loader_config, rank, world_size) as loader:
        loop.train(state, module, loader.batches(state.step, state.attempt), config, device=device, save=save,
                   report=report if rank == 0 else lambda row: None)
    return state
