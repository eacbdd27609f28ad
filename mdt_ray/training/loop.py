"""The training loop, read from top to bottom. It knows no Ray and no files: batches, report and save come from outside.

Resume needs nothing but a restored state and batches that start at its step.
"""

import contextlib
import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from mdt_ray.config import TrainConfig
from mdt_ray.data.loader import Batch
from mdt_ray.training import ranks
from mdt_ray.training.ema import update_averages
from mdt_ray.training.meters import Meters
from mdt_ray.training.optim import clip_gradients, learning_rate
from mdt_ray.training.state import TrainState

MAX_SKIPPED_IN_A_ROW = 20
STOP_CHECK_SECONDS = 0.5
"""Between two questions to all ranks whether to stop: often enough for any notice, too rare to cost anything."""


class NonFiniteSteps(Exception):
    """Too many steps in a row had a non-finite loss or gradient: time to go back to a checkpoint."""


def train(state: TrainState, module: nn.Module, batches: Iterable[tuple[Batch, ...]], config: TrainConfig, *,
          device: torch.device, report: Callable[[dict], None], save: Callable[[bool, bool], None],
          validate: Callable[[TrainState], dict[str, float]] | None = None,
          should_stop: Callable[[], bool] = lambda: False, beat: Callable[[], None] = lambda: None) -> bool:
    """Train `state` to config.num_steps; returns whether it got there, or was asked to stop before.

    Args:
        state: updated in place; `state.step` says where to go on.
        module: the TrainingStep of state.model, wrapped in DDP where there is more than one rank.
        batches: this rank's batches from state.step on, each in parts whose gradients are added up.
        report: called with every row of metrics, on every rank with the same row.
        save: called on every rank where a checkpoint is due, or a snapshot of the power-function averages, with which it is.
        validate: gives columns for the row of every validation step, on every rank.
        should_stop: asked every STOP_CHECK_SECONDS, or every step; all ranks stop at the same step where one says yes.
        beat: called once a step, for whoever watches that there is progress.
    Raises NonFiniteSteps where no step of MAX_SKIPPED_IN_A_ROW had a finite gradient, or the last one had none.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    meters = Meters(device, config)
    skipped_in_a_row = torch.zeros((), device=device)
    model = state.model
    if state.step >= config.num_steps:
        return True
    due = False
    batches = iter(batches)
    ask_at, asked = state.step + 1, (state.step, time.perf_counter())
    while True:
        started = time.perf_counter()
        parts = [part.to(device) for part in next(batches)]
        meters.waited += time.perf_counter() - started
        if meters.steps == 0 and world_size > 1:
            settle_buckets(module, parts[-1])
        lr = learning_rate(state.step, config.optim)
        for group in state.optimizer.param_groups:
            group["lr"] = lr

        for part in parts:
            with contextlib.nullcontext() if part is parts[-1] or world_size == 1 else module.no_sync():
                losses = module(part)
                # A rank's share of the global mean: DDP averages over ranks, whose number of images may differ.
                per_sample = sum(losses[name] for name in ("full", "masked") if name in losses)  # (B,)
                (per_sample.sum() * world_size / config.batch_size).backward()
            meters.add(part.t, losses)
        grad_norm = clip_gradients(model, config.optim.clip_norm)
        # Decided on the device, after the all-reduce: every rank skips the same steps, without a host sync.
        found_inf = (~torch.isfinite(grad_norm)).float()
        skipped_in_a_row = (skipped_in_a_row + 1) * found_inf
        state.optimizer.found_inf = found_inf
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        update_averages(state.averages, model, state.step, config.ema)
        state.step += 1
        meters.add_step(grad_norm, found_inf)
        beat()

        last, stopping = state.step >= config.num_steps, False
        if state.step >= ask_at:
            seconds_a_step = (time.perf_counter() - asked[1]) / (state.step - asked[0])
            stopping, steps = ranks.largest(should_stop(), STOP_CHECK_SECONDS // seconds_a_step)
            ask_at, asked = state.step + max(1, int(steps)), (state.step, time.perf_counter())
        saving = state.step % config.checkpoint_every_steps == 0 or last or stopping
        validating = validate is not None and state.step % config.validate_every_steps == 0
        if state.step % config.log_every_steps == 0 or validating or saving or due:
            row = {"step": state.step, "images_seen": state.step * config.batch_size, "attempt": state.attempt, "lr": lr,
                   **meters.collect(steps_left=config.num_steps - state.step)}
            if validating:
                row |= validate(state)
                meters.restart_clock()
            report(row)
            if skipped_in_a_row >= (1 if last else MAX_SKIPPED_IN_A_ROW):
                raise NonFiniteSteps(f"no finite gradient in the last {int(skipped_in_a_row)} steps, at step {state.step}")
        due = due or saving
        snapshot = bool(config.ema.power_stds) and (state.step % config.ema.snapshot_every_steps == 0 or last)
        if due or snapshot:
            checkpoint = due and not skipped_in_a_row  # what follows a non-finite step is no place to come back to
            save(checkpoint, snapshot)
            due = due and not checkpoint
        if last or stopping:
            return last


def settle_buckets(module: nn.Module, batch: Batch) -> None:
    """One throw-away backward pass. DDP regroups its gradient buckets after the first one, which changes the order of sums
    for three ranks or more; without this, a resumed run would differ from a straight one in the last bits."""
    losses = module(batch)
    sum(loss.sum() for loss in losses.values() if loss.requires_grad).backward()
    for parameter in module.parameters():
        parameter.grad = None
