"""What a worker of a training run does between being started and the loop. No Ray: any launcher may call `run_rank`."""

import contextlib
import functools
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from mdt_ray import checkpoints, storage
from mdt_ray.autocast import autocast_dtype
from mdt_ray.config import TrainConfig
from mdt_ray.data.latents import Manifest
from mdt_ray.data.loader import Loader, LoaderConfig
from mdt_ray.inference.convert import load_any, origin_of
from mdt_ray.models.compiling import compile_blocks
from mdt_ray.models.transfer import transfer
from mdt_ray.run_folder import TakenOver
from mdt_ray.training import loop, ranks, samples, snapshots
from mdt_ray.training import state as states
from mdt_ray.training.contract import INIT_FROM, STACKS, TrainingDiverged, write_metrics
from mdt_ray.training.ema import build_averages
from mdt_ray.training.optim import build_optimizer
from mdt_ray.training.state import TrainState
from mdt_ray.training.step import TrainingStep, build_model, keep_inputs_only
from mdt_ray.training.validation import Validation
from mdt_ray.training.watchdog import Watchdog
from mdt_ray.training.writer import Writer

logger = logging.getLogger(__name__)
MAX_RETURNS = 3
"""Returns to one checkpoint before a run with non-finite gradients is given up."""


def checkpoint_facts(config: TrainConfig, manifest: Manifest) -> dict:
    """What sampling needs to know beside the weights."""
    return {"vae": manifest.vae, "image_size": manifest.image_size, "latent_shape": manifest.shape,
            "class_names": manifest.class_names, "num_classes": config.model.num_classes}


def run_rank(config: TrainConfig, manifest: Manifest, run: dict, *, rank: int = 0, world_size: int = 1,
             device: torch.device | str = "cpu", report: Callable[[dict], None] = lambda row: None,
             may_write: Callable[[], bool] = lambda: True, should_stop: Callable[[], bool] = lambda: False) -> TrainState:
    """Train as one rank, from the newest checkpoint of config.output or from the start, to config.num_steps.

    Args:
        config: resolved, its model complete.
        run: content of run.json for the checkpoints.
        rank, world_size: of a torch.distributed group that exists already where world_size > 1.
        report: gets every row of metrics, on rank 0 only.
        may_write: asked before a checkpoint is written, on rank 0 only; False ends the run.
        should_stop: asked now and then; where it says yes on any rank, all write a checkpoint and return.
    Raises ValueError for bad latents or checkpoints, TrainingDiverged if the loss stays non-finite, RuntimeError if
    another run took over the output.
    """
    device = torch.device(device)
    dtype = autocast_dtype(config.precision, device)
    # fp32 means fp32, convolutions too: TF32 keeps 10 bits of mantissa (three more than bf16).
    tf32 = config.precision == "tf32" or dtype is not None
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.use_deterministic_algorithms(config.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid of that mode, which costs time
    keep = functools.partial(_keep_stacks, config.output, rank)
    with Watchdog(config.hang_timeout_s, keep) as watchdog, Writer() as writer:
        state, facts, resumed = _initial(config, manifest, rank, device)
        if config.gradient_checkpointing:
            keep_inputs_only(state.model)
        if config.compile:
            compile_blocks(state.model)
        module = TrainingStep(state.model, config.loss, dtype)
        if world_size > 1:
            # The gradients lie in the buckets that are sent, not in a copy. (Its broadcast of the half megabyte of buffers,
            # which never change, stays: PyTorch has just renamed the option against it.)
            module = DistributedDataParallel(module, gradient_as_bucket_view=True)
        validate = _validation(config, manifest, rank, world_size, device, dtype, watchdog.beat)

        def save(checkpoint: bool, snapshot: bool) -> None:
            if rank == 0:
                # Averages first: from the checkpoint a resume would not come back to them.
                writes = [snapshots.save_snapshot(state, config.output, config.ema, facts)] if snapshot else []
                writes += _publishing(state, config, run, facts) if checkpoint else []
                writer.submit(lambda: _write_all(writes, may_write, config.output))
            watchdog.beat()

        def told(row: dict) -> None:
            if rank == 0:
                state.history.append(row)
                report(row)

        def asked_to_stop() -> bool:
            writer.check()
            return should_stop()

        if rank == 0:
            _drop_after(config.output, state.step, may_write)
            logger.info("rank 0 of %d: %d training images, %d held out, %d lanes, %s, %d threads, from step %d", world_size,
                        manifest.num_train, manifest.num_rows - manifest.num_train, config.num_lanes, dtype or torch.float32,
                        torch.get_num_threads(), state.step)
        if not resumed:
            save(True, False)  # (a resume would replace the only one there is, and a kill meanwhile leave none)
        returns: dict[int, int] = {}  # how often, by the step returned to
        while True:
            with Loader(config.latents, manifest, loader_config(config), rank, world_size, config.accumulation,
                        pin_memory=device.type == "cuda") as loader:
                try:
                    loop.train(state, module, loader.batches(state.step, state.attempt), config, device=device, save=save,
                               report=told, validate=validate, should_stop=asked_to_stop, beat=watchdog.beat)
                    return state
                except loop.NonFiniteSteps as error:
                    writer.wait()
                    _go_back(state, config, returns, error, may_write)


def _initial(config: TrainConfig, manifest: Manifest, rank: int, device: torch.device) -> tuple[TrainState, dict, bool]:
    """The state to begin with: the newest checkpoint's, that of other weights, or a fresh one; facts for checkpoints, which
    rank 0 writes; and whether it is a checkpoint's."""
    torch.manual_seed(config.seed)  # the weights' initial values; every other draw has a generator of its own
    model = build_model(config.model, config.loss.passes).train().to(device)
    started_from = None
    with _newest(config.output) as (found, files):
        if config.init_from and not found:
            if rank == 0:
                with storage.outages_told():  # which a launch or a trial may outlast
                    done, started_from = transfer(model, load_any(config.init_from)), origin_of(config.init_from)
                text = "\n  ".join([f"started from {config.init_from}:", *done.lines()])
                logger.info("%s", text)
                storage.write_bytes(storage.join(config.output, INIT_FROM), f"{text}\n".encode())
            ranks.share(model.state_dict().values())
        averages = build_averages(model, config.ema)
        state = TrainState(model=model, ema=averages.pop("ema"), more_ema=averages,
                           optimizer=build_optimizer(model, config.optim, config.compile))
        if found:
            states.restore(state, files)
            started_from = storage.read_json(str(files / "state.json")).get("started_from") if files else None
    facts = checkpoint_facts(config, manifest) | ({"started_from": started_from} if started_from else {})
    return state, facts, bool(found)


@contextlib.contextmanager
def _newest(output: str) -> Iterator[tuple[str | None, Path | None]]:
    """The newest whole checkpoint, found by rank 0 for all: one check of its files, and no two opinions. Rank 0 alone has
    its files."""
    with checkpoints.newest(output) if ranks.is_first() else contextlib.nullcontext((None, None)) as (found, files):
        yield ranks.from_first(found), files


def loader_config(config: TrainConfig) -> LoaderConfig:
    """What decides a batch's content."""
    side = config.model.input_size // config.model.patch_size
    return LoaderConfig(batch_size=config.batch_size, num_lanes=config.num_lanes, seed=config.seed, flip=config.flip,
                        num_classes=config.model.num_classes, num_tokens=side * side,
                        class_dropout_prob=config.model.class_dropout_prob)


def _validation(config: TrainConfig, manifest: Manifest, rank: int, world_size: int, device: torch.device,
                dtype: torch.dtype | None, beat: Callable[[], None]) -> Callable[[TrainState], dict] | None:
    if not config.validate_every_steps:
        return None
    validation = Validation(config.latents, manifest, rank, world_size, device, dtype)
    if not validation.num_images:
        if rank == 0:
            logger.warning("no validation loss: the latents hold out no image; precompute with --validation-share 0.01")
        return None
    return lambda state: validation.loss(state.ema, beat)


def _write_all(writes: list[Callable[[], None]], may_write: Callable[[], bool], output: str) -> None:
    """What is done is not done again where a later one is tried again."""
    while writes:
        if not may_write():
            raise TakenOver.of(output)
        writes[0]()
        writes.pop(0)


def _drop_after(output: str, step: int, may_write: Callable[[], bool]) -> None:
    """Delete what a run that goes on from a step has beyond it. Raises TakenOver where the folder is another's by now."""
    if not may_write():
        raise TakenOver.of(output)
    checkpoints.drop_after(output, step)
    snapshots.drop_after(output, step)


def _publishing(state: TrainState, config: TrainConfig, run: dict, facts: dict) -> list[Callable[[], None]]:
    """A copy of the state is taken now; what is returned writes it, then the metrics, and then deletes old ones."""
    history = list(state.history)
    return [states.snapshot(state, config.output, run, facts), lambda: write_metrics(config.output, history),
            lambda: states.prune_checkpoints(config.output, config.keep_last, config.keep_every_steps,
                                             spare=samples.due(config.output, config.sample_every_steps))]


def _go_back(state: TrainState, config: TrainConfig, returns: dict[int, int], error: loop.NonFiniteSteps,
             may_write: Callable[[], bool]) -> None:
    """Restore the newest checkpoint with other random draws to come. Raises TrainingDiverged after MAX_RETURNS to one."""
    attempt = state.attempt
    with _newest(config.output) as (found, files):
        if found is None:
            raise TrainingDiverged(f"{error}, and there is no checkpoint to return to") from error
        step = checkpoints.step_of(found)
        returns[step] = returns.get(step, 0) + 1
        if returns[step] > MAX_RETURNS:
            raise TrainingDiverged(f"{error}; {MAX_RETURNS} returns to step {step} with other random draws ended alike; "
                                   "lower optim.lr, set optim.clip_norm, or use precision fp32, in another output folder"
                                   ) from error
        states.restore(state, files)
    if ranks.is_first():
        _drop_after(config.output, state.step, may_write)
    state.attempt = max(attempt, state.attempt) + 1
    logger.warning("%s; going back to step %d, with other random draws (attempt %d)", error, step, state.attempt)


def _keep_stacks(output: str, rank: int, text: str) -> None:
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-rank-{rank}.txt"
    uri = storage.join(output, STACKS, name)
    head = f"rank {rank} on {socket.gethostname()} made no step for too long; its threads, innermost call first:\n\n"
    storage.write_bytes(uri, (head + text).encode())
    logger.error("rank %d made no step for too long; %s says where it was; it ends, to be started again", rank, uri)
