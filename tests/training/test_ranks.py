"""Several ranks without Ray: who reads a checkpoint, one rank's bad gradient, a peer that is silent, compiled blocks."""

import dataclasses
import datetime
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._dynamo.utils import counters

from mdt_ray import checkpoints, storage
from mdt_ray.data import latents
from mdt_ray.data.loader import Loader
from mdt_ray.training import contract, loop
from mdt_ray.training import run as training
from tests.helpers import make_latents, tiny_training

NUM_RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    make_latents(folder, num_images=130)
    return folder


def launch(rank_of, folder: Path, output: Path, *arguments) -> list[mp.Process]:
    """Start `rank_of(rank, ...)` in a process for each rank."""
    output.mkdir(exist_ok=True)
    mp.set_forkserver_preload([__name__])  # all ranks share the seconds that imports take
    context = mp.start_processes(_rank, (rank_of, folder, output, *arguments), NUM_RANKS, join=False,
                                 start_method="forkserver")
    return context.processes


def finish(processes: list[mp.Process]) -> list[int]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def _rank(rank: int, rank_of, folder: Path, output: Path, *arguments) -> None:
    torch.set_num_threads(1)
    rendezvous = output / f"{rank_of.__name__}.rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=NUM_RANKS,
                            timeout=datetime.timedelta(seconds=60 if rank_of is not silent else 4))
    rank_of(rank, folder, output, *arguments)
    dist.destroy_process_group()


def run(rank: int, folder: Path, output: Path, **changes):
    config = tiny_training(folder, output, **changes)
    manifest = latents.open_manifest(config.latents)
    config = dataclasses.replace(config, model=contract.resolve_model(config.model, manifest))
    return training.run_rank(config, manifest, {}, rank=rank, world_size=NUM_RANKS)


def plain(rank: int, folder: Path, output: Path) -> None:
    run(rank, folder, output)


def steps(output: Path) -> list[int]:
    return [row["step"] for row in checkpoints.read_metrics(str(output / "metrics.parquet"))]


# Who reads


def without_a_store(rank: int, folder: Path, output: Path) -> None:
    if rank > 0:
        def refuse(*_):
            raise AssertionError("only rank 0 reads checkpoints and weights to start from")

        storage.fetched = training.load_any = refuse
    begun = tiny_training(folder, output).ema
    state = run(rank, folder, output, num_steps=30, ema=dataclasses.replace(begun, more_decays=(0.5,)))
    other = run(rank, folder, output / "other", num_steps=3, init_from=str(output))
    for tensor in (*state.model.parameters(), *state.more_ema["ema_0.5"].parameters(), *other.ema.parameters(),
                   *(moment for moments in state.optimizer.state.values() for moment in moments.values())):
        first = tensor.detach().clone()
        dist.broadcast(first, src=0)
        assert torch.equal(first, tensor)


def several_averages(rank: int, folder: Path, output: Path) -> None:
    begun = tiny_training(folder, output).ema
    run(rank, folder, output, ema=dataclasses.replace(begun, more_decays=(0.5,)))


@pytest.mark.slow
def test_rank_0_reads_for_all_and_two_train_as_one(folder, tmp_path):
    assert finish(launch(several_averages, folder, tmp_path)) == [0] * NUM_RANKS
    assert finish(launch(without_a_store, folder, tmp_path)) == [0] * NUM_RANKS
    assert steps(tmp_path) == list(range(1, 31))
    assert steps(tmp_path / "other") == [1, 2, 3]
    alone = tiny_training(folder, tmp_path / "alone", num_steps=30)
    manifest = latents.open_manifest(alone.latents)
    training.run_rank(dataclasses.replace(alone, model=contract.resolve_model(alone.model, manifest)), manifest, {})
    two, one = ([row["loss"] for row in checkpoints.read_metrics(str(output / "metrics.parquet"))]
                for output in (tmp_path, tmp_path / "alone"))
    assert two == pytest.approx(one, rel=1e-5)


# Non-finite steps


def one_is_poisoned(rank: int, folder: Path, output: Path, bad_steps: range, bad_attempts: int) -> None:
    class Poisoned(Loader):
        """Rank 1's latents are not finite at some steps."""

        def batches(self, first_step, attempt=0):
            for parts in super().batches(first_step, attempt):
                bad = rank == 1 and parts[0].step in bad_steps and attempt < bad_attempts
                yield tuple(dataclasses.replace(part, x_0=part.x_0 * (float("nan") if bad else 1.0)) for part in parts)

    training.Loader = Poisoned
    try:
        state = run(rank, folder, output, num_steps=40)
    except contract.TrainingDiverged:
        raise SystemExit(3) from None
    assert state.attempt == (1 if len(bad_steps) > 20 else 0)
    assert all(tensor.isfinite().all() for tensor in (*state.model.parameters(), *state.ema.parameters()))


@pytest.mark.parametrize("what", ["a few steps", *(pytest.param(what, marks=pytest.mark.slow) for what in (
    "many steps", "always"))])
def test_all_ranks_skip_and_go_back_where_one_has_a_bad_gradient(folder, tmp_path, what):
    bad = range(12, 15) if what == "a few steps" else range(12, 99)
    codes = finish(launch(one_is_poisoned, folder, tmp_path, bad, 99 if what == "always" else 1))
    if what == "always":
        assert codes == [3] * NUM_RANKS, "every rank gives up, and none waits for another"
        assert checkpoints.latest(str(tmp_path)).endswith("10")
        return
    assert codes == [0] * NUM_RANKS
    rows = checkpoints.read_metrics(str(tmp_path / "metrics.parquet"))
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert sum(row["skipped_steps"] for row in rows) == (3 if what == "a few steps" else 0)
    assert [row["attempt"] for row in rows] == ([0] * 40 if what == "a few steps" else [0] * 10 + [1] * 30)


# A peer that is silent


def silent(rank: int, folder: Path, output: Path) -> None:
    """Nobody watches the clock here but the collective call itself; rank 1 stops in the middle of a step."""
    class Stopping(Loader):
        def batches(self, first_step, attempt=0):
            for parts in super().batches(first_step, attempt):
                if rank == 1 and parts[0].step == 12:
                    os.kill(os.getpid(), signal.SIGSTOP)
                yield parts

    training.Loader = Stopping
    run(rank, folder, output, hang_timeout_s=0.0)


@pytest.mark.slow
def test_a_collective_call_that_waits_too_long_ends_its_rank(folder, tmp_path):
    """After that the launcher starts all again, from the newest checkpoint, and the result is that of a straight run."""
    processes = launch(silent, folder, tmp_path / "hung")
    processes[0].join(120)
    assert processes[0].exitcode not in (None, 0)
    peer = psutil.Process(processes[1].pid)
    assert peer.status() == psutil.STATUS_STOPPED
    peer.kill()
    assert checkpoints.latest(str(tmp_path / "hung")).endswith("10")
    assert finish(launch(plain, folder, tmp_path / "hung")) == [0] * NUM_RANKS
    assert finish(launch(plain, folder, tmp_path / "straight")) == [0] * NUM_RANKS
    a, b = (Path(checkpoints.latest(str(tmp_path / name))) / "optimizer.pt" for name in ("hung", "straight"))
    assert a.read_bytes() == b.read_bytes()


# Memory


def in_buckets(rank: int, folder: Path, output: Path) -> None:
    storages = []
    clip = loop.clip_gradients

    def watched(model, clip_norm):
        storages.append(len({p.grad.untyped_storage().data_ptr() for p in model.parameters()}))
        return clip(model, clip_norm)

    loop.clip_gradients = watched
    run(rank, folder, output, num_steps=3, accumulation=2)
    assert storages == [1, 1, 1]  # one bucket of less than 25 MiB holds all of them


def test_gradients_lie_in_the_buckets_that_are_sent(folder, tmp_path):
    assert finish(launch(in_buckets, folder, tmp_path)) == [0] * NUM_RANKS


# Compiled


def compiled(rank: int, folder: Path, output: Path) -> None:
    state = run(rank, folder, output, num_steps=6, compile=True)
    for tensor in state.model.parameters():
        first = tensor.detach().clone()
        dist.broadcast(first, src=0)
        assert torch.equal(first, tensor)
    if rank == 0:
        assert counters["stats"]["unique_graphs"] == 3  # whole blocks, not cut where DDP's buckets end


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on CPUs")
def test_compiled_ranks_train_as_others(folder, tmp_path):
    assert finish(launch(compiled, folder, tmp_path)) == [0] * NUM_RANKS
    assert finish(launch(plain, folder, tmp_path / "eager")) == [0] * NUM_RANKS
    found, expected = ([row["loss"] for row in checkpoints.read_metrics(str(folder / "metrics.parquet"))]
                       for folder in (tmp_path, tmp_path / "eager"))
    assert found == pytest.approx(expected[:6], rel=1e-4)
