"""The training loop, read from top to bottom. It knows no Ray and no files: batches, report and save come from outside.

Resume needs nothing but a restored state and batches that start at its step.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from mdt_ray.config import TrainConfig
from mdt_ray.data.loader import Batch
from mdt_ray.training.ema import ema_decay, update_ema
from mdt_ray.training.meters import Meters
from mdt_ray.training.optim import clip_gradients, learning_rate
from mdt_ray.training.state import TrainState

MAX_SKIPPED_IN_A_ROW = 20


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


def train(state: TrainState, module: nn.Module, batches: Iterable[tuple[Batch]], config: TrainConfig, *,
          device: torch.device, report: Callable[[dict], None], save: Callable[[TrainState], None]) -> None:
    """Train `state` to config.num_steps.

    Args:
        state: updated in place; `state.step` says where to go on.
        module: the TrainingStep of state.model, wrapped in DDP where there is more than one rank.
        batches: this rank's batches from state.step on.
        report: called with every row of metrics, on every rank with the same row.
        save: called at every checkpoint step, on every rank.
    Raises TrainingDiverged after MAX_SKIPPED_IN_A_ROW steps without a finite gradient.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    meters = Meters(device, config.batch_size)
    skipped_in_a_row = torch.zeros((), device=device)
    model = state.model
    if state.step >= config.num_steps:
        return
    if state.step == 0:
        save(state)
    for (batch,) in batches:
        batch = batch.to(device)
        if meters.steps == 0 and world_size > 1:
            settle_buckets(module, batch)
        lr = learning_rate(state.step, config.optim)
        for group in state.optimizer.param_groups:
            group["lr"] = lr

        losses = module(batch)
        # A rank's share of the global mean: DDP averages over ranks, whose number of images may differ.
        per_sample = sum(losses[name] for name in ("full", "masked") if name in losses)  # (B,)
        (per_sample.sum() * world_size / config.batch_size).backward()
        grad_norm = clip_gradients(model, config.optim.clip_norm)
        # Decided on the device, after the all-reduce: every rank skips the same steps, without a host sync.
        found_inf = (~torch.isfinite(grad_norm)).float()
        skipped_in_a_row = (skipped_in_a_row + 1) * found_inf
        state.optimizer.found_inf = found_inf
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        update_ema(state.ema, model, ema_decay(state.step, config.ema))
        state.step += 1
        meters.add(losses, grad_norm, found_inf)

        last = state.step >= config.num_steps
        if state.step % config.log_every_steps == 0 or last:
            row = {"step": state.step, "images_seen": state.step * config.batch_size, "lr": lr, **meters.collect()}
            state.history.append(row)
            report(row)
            if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise TrainingDiverged(
                    f"no finite gradient in the last {int(skipped_in_a_row)} steps, at step {state.step}; the newest "
                    "checkpoint is from before; lower optim.lr, set optim.clip_norm, or use precision fp32")
        if state.step % config.checkpoint_every_steps == 0 or last:
            save(state)
        if last:
            return


def settle_buckets(module: nn.Module, batch: Batch) -> None:
    """One throw-away backward pass. DDP regroups its gradient buckets after the first one, which changes the order of sums
    for three ranks or more; without this, a resumed run would differ from a straight one in the last bits."""
    losses = module(batch)
    sum(loss.sum() for loss in losses.values() if loss.requires_grad).backward()
    for parameter in module.parameters():
        parameter.grad = None
