"""What a run without Ray does when it goes wrong: non-finite steps, hangs, a wish to stop, a checkpoint that fails."""

import dataclasses
import math
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mdt_ray import checkpoints
from mdt_ray.config import LossConfig
from mdt_ray.data import latents
from mdt_ray.data.loader import Loader
from mdt_ray.run_folder import TakenOver
from mdt_ray.training import contract, loop
from mdt_ray.training import run as training
from mdt_ray.training import state as states
from mdt_ray.training import writer as writing
from mdt_ray.training.watchdog import EXIT_CODE
from mdt_ray.training.writer import Writer
from tests import s3
from tests.conftest import ROOT
from tests.helpers import make_latents, tiny_training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    make_latents(folder, num_images=130)
    return folder


def run(config, **arguments):
    manifest = latents.open_manifest(config.latents)
    config = dataclasses.replace(config, model=contract.resolve_model(config.model, manifest))
    return training.run_rank(config, manifest, {}, **arguments)


def poison(monkeypatch, is_bad):
    """Make latents non-finite where is_bad(step, attempt)."""

    class Poisoned(Loader):
        def batches(self, first_step, attempt=0):
            for parts in super().batches(first_step, attempt):
                factor = float("nan") if is_bad(parts[0].step, attempt) else 1.0
                yield tuple(dataclasses.replace(part, x_0=part.x_0 * factor) for part in parts)

    monkeypatch.setattr(training, "Loader", Poisoned)


# Non-finite steps


def test_non_finite_steps_send_the_run_back_with_other_draws(folder, tmp_path, monkeypatch, caplog):
    poison(monkeypatch, lambda step, attempt: attempt == 0 and step >= 12)
    config = tiny_training(folder, tmp_path, num_steps=40)
    state = run(config)
    assert (state.step, state.attempt) == (40, 1)
    assert "at step 32; going back to step 10, with other random draws (attempt 1)" in caplog.text
    assert [row["step"] for row in state.history] == list(range(1, 41))
    assert [row["attempt"] for row in state.history] == [0] * 10 + [1] * 30
    assert all(row["skipped_steps"] == 0 and math.isfinite(row["loss"]) for row in state.history)
    assert checkpoints.latest(str(tmp_path)).endswith("40")


def test_no_checkpoint_is_written_amid_non_finite_steps(folder, tmp_path, monkeypatch):
    """Steps 20 and 30 are amid them: the run returns to 10, where all was well."""
    poison(monkeypatch, lambda step, attempt: attempt == 0 and step >= 12)
    seen = []
    run(tiny_training(folder, tmp_path, num_steps=35, keep_last=9),
        report=lambda row: seen.append((row["step"], row["attempt"], checkpoints.list_finished(str(tmp_path))[-1][-2:])))
    assert (seen[31][2] and str(seen[31][0]), seen[31][1]) == ("32", 0)
    assert {newest for step, attempt, newest in seen if attempt == 0 and step > 12} == {"10"}


def test_a_checkpoint_due_at_a_skipped_step_comes_after_it(folder, tmp_path, monkeypatch):
    poison(monkeypatch, lambda step, attempt: step in (9, 10))
    run(tiny_training(folder, tmp_path, num_steps=15, keep_last=9))
    assert [checkpoints.step_of(uri) for uri in checkpoints.list_finished(str(tmp_path))] == [0, 12, 15]


def test_a_run_that_stays_non_finite_stops(folder, tmp_path, monkeypatch):
    poison(monkeypatch, lambda step, attempt: step >= 12)
    with pytest.raises(contract.TrainingDiverged, match=r"no finite gradient in the last 20 steps, at step 32; 3 returns to "
                                                        r"step 10 with other random draws ended alike; lower optim.lr"):
        run(tiny_training(folder, tmp_path, num_steps=99))
    assert checkpoints.latest(str(tmp_path)).endswith("10")


def test_a_return_is_the_same_after_a_restart(folder, tmp_path, monkeypatch):
    """What was trained after a return resumes with its own draws, bit for bit."""
    poison(monkeypatch, lambda step, attempt: attempt == 0 and step >= 12)
    straight = run(tiny_training(folder, tmp_path / "straight", num_steps=40))
    run(tiny_training(folder, tmp_path / "resumed", num_steps=30))
    resumed = run(tiny_training(folder, tmp_path / "resumed", num_steps=40))
    assert resumed.attempt == 1
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_run_that_lost_its_folder_does_not_return_there(folder, tmp_path, monkeypatch):
    lost = []
    poison(monkeypatch, lambda step, attempt: step >= 12 and not lost.append(step))
    with pytest.raises(TakenOver, match="another run has taken over"):
        run(tiny_training(folder, tmp_path, num_steps=40), may_write=lambda: not lost)
    assert checkpoints.latest(str(tmp_path)).endswith("10")


class HostSyncs(TorchDispatchMode):
    """Counts the operations that make the host wait for a device: a value read, or a shape that depends on values. (Copies
    to the host cannot be told from others on a CPU.)"""

    WAITING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
               torch.ops.aten.equal, torch.ops.aten._unique2, torch.ops.aten.unique_dim, torch.ops.aten.unique_consecutive)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        booleans = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += booleans or func.overloadpacket in self.WAITING or func is torch.ops.aten.repeat_interleave.Tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adan", "muon"))])
def test_steps_are_skipped_and_counted_without_a_host_sync(folder, tmp_path, monkeypatch, name):
    """18 steps more, 6 of them skipped, wait for the device as often: when the one row of metrics is due."""
    poison(monkeypatch, lambda step, attempt: step % 3 == 1)
    counts = []
    for num_steps in (12, 30):
        config = tiny_training(folder, tmp_path / f"{num_steps}", num_steps=num_steps, log_every_steps=100,
                               checkpoint_every_steps=100)
        with HostSyncs() as seen:
            state = run(dataclasses.replace(config, optim=dataclasses.replace(config.optim, name=name)))
        assert [row["skipped_steps"] for row in state.history] == [num_steps // 3]
        counts.append(seen.count)
    assert 0 < counts[0] == counts[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["adamw", "adan", "muon"])
def test_a_gpu_is_waited_for_when_a_row_is_due_only(folder, tmp_path, monkeypatch, name, compiled):
    """As above, told by CUDA itself; the first run is there for what is made once a process."""
    poison(monkeypatch, lambda step, attempt: step % 3 == 1)
    counts = []
    for number, num_steps in enumerate((30, 12, 30)):
        config = tiny_training(folder, tmp_path / f"{number}", num_steps=num_steps, log_every_steps=100,
                               checkpoint_every_steps=100, compile=compiled)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run(dataclasses.replace(config, optim=dataclasses.replace(config.optim, name=name)), device="cuda")
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("called a synchronizing CUDA operation" in str(warning.message) for warning in seen))
    assert 0 < counts[1] == counts[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_gpu_lie_where_it_copies_from(folder, tmp_path):
    config = tiny_training(folder, tmp_path)
    manifest = latents.open_manifest(str(folder))
    settings = training.loader_config(dataclasses.replace(config, model=contract.resolve_model(config.model, manifest)))
    with Loader(str(folder), manifest, settings, 0, 1, pin_memory=True) as loader:
        (batch,) = next(loader.batches(0))
    assert batch.x_0.is_pinned()
    assert batch.images.is_pinned()


# Hangs

HANGING = """
import sys, threading, time
from tests.training.test_faults import run, tiny_training, Loader, training
class Hanging(Loader):
    def batches(self, first_step, attempt=0):
        for parts in super().batches(first_step, attempt):
            if parts[0].step == 12:
                {hang}
            yield parts
training.Loader = Hanging
run(tiny_training(sys.argv[1], sys.argv[2], hang_timeout_s=3.0))
"""


@pytest.mark.parametrize("hang", [
    pytest.param("threading.Event().wait()", id="waiting", marks=pytest.mark.slow),
    pytest.param("import ctypes; ctypes.PyDLL(None).sleep(100)", id="holding the interpreter")])
def test_a_hang_leaves_its_stacks_and_ends_the_process(folder, tmp_path, hang):
    done = subprocess.run([sys.executable, "-c", HANGING.format(hang=hang), folder, tmp_path], cwd=ROOT, timeout=120,
                          capture_output=True, text=True)
    if hang.startswith("threading"):
        assert done.returncode == EXIT_CODE, done.stderr
        text, = (path.read_text() for path in (tmp_path / "stacks").glob("*-rank-0.txt"))
        assert "made no step for too long" in text
    else:  # no thread of Python can run: the stacks are on stderr
        assert done.returncode == 1, done.stderr
        text = done.stderr
    assert "in batches" in text
    assert "in run_rank" in text
    assert checkpoints.latest(str(tmp_path)).endswith("10")


SLOW_VALIDATION = """
import sys, time
from tests.training.test_faults import run, tiny_training
from mdt_ray.training import validation
batch = validation.Validation._batch
def slowly(self, rows):
    time.sleep(1.5)
    return batch(self, rows)
validation.Validation._batch, validation.BATCH_SIZE = slowly, 3
state = run(tiny_training(sys.argv[1], sys.argv[2], hang_timeout_s=3.0, num_steps=5, validate_every_steps=5))
assert "val_loss" in state.history[-1]
"""


@pytest.mark.slow
def test_a_long_validation_is_no_hang(folder, tmp_path):
    """It takes five times 1.5 s, of 3 s that a hang may take."""
    done = subprocess.run([sys.executable, "-c", SLOW_VALIDATION, folder, tmp_path], cwd=ROOT, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# A wish to stop


def test_a_wish_to_stop_ends_in_a_checkpoint_and_goes_on_bit_for_bit(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "STOP_CHECK_SECONDS", 0.0)  # ask at every step
    straight = run(tiny_training(folder, tmp_path / "straight", num_steps=30))
    seen = []
    stopped = run(tiny_training(folder, tmp_path / "stopped", num_steps=30, checkpoint_every_steps=25), report=seen.append,
                  should_stop=lambda: len(seen) >= 13)
    assert stopped.step == 14
    assert checkpoints.latest(str(tmp_path / "stopped")).endswith("14")
    resumed = run(tiny_training(folder, tmp_path / "stopped", num_steps=30, checkpoint_every_steps=25))
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True))
    assert len(resumed.history) == 30


# Checkpoints in the background


def test_training_goes_on_while_a_checkpoint_is_written(folder, tmp_path, monkeypatch):
    """The write of step 10 waits for the row of step 15, which could not come if the loop waited for the write."""
    fifteen, create = threading.Event(), checkpoints.create

    def slow(uri):
        if uri.endswith("10"):
            assert fifteen.wait(60)
        return create(uri)

    monkeypatch.setattr(checkpoints, "create", slow)
    straight = run(tiny_training(folder, tmp_path / "a"), report=lambda row: row["step"] == 15 and fifteen.set())
    monkeypatch.undo()
    run(tiny_training(folder, tmp_path / "b", num_steps=10))
    a, b = (tmp_path / name / "checkpoints" / "step-00000010" for name in "ab")
    for path in ("optimizer.pt", "model/diffusion_pytorch_model.safetensors", "ema/diffusion_pytorch_model.safetensors"):
        assert (a / path).read_bytes() == (b / path).read_bytes(), f"{path}: what was copied at step 10, not what came later"
    assert straight.step == 20


def test_a_checkpoint_that_cannot_be_written_ends_the_run(folder, tmp_path, monkeypatch):
    def full(uri):
        raise OSError(28, "No space left on device", uri)

    monkeypatch.setattr(checkpoints, "create", full)
    monkeypatch.setattr(writing, "RETRY_SECONDS", ())
    monkeypatch.setattr(loop, "STOP_CHECK_SECONDS", 0.0)
    seen = []
    with pytest.raises(OSError, match="No space left"):
        run(tiny_training(folder, tmp_path, num_steps=5000, checkpoint_every_steps=5000), report=seen.append)
    assert len(seen) < 4999, "it was noticed before the next checkpoint was due"


def test_a_checkpoint_is_written_when_the_store_answers_again(folder, tmp_path, monkeypatch):
    failures, create = [OSError("503"), OSError("503")], checkpoints.create

    def flaky(uri):
        if uri.endswith("10") and failures:
            raise failures.pop()
        return create(uri)

    monkeypatch.setattr(checkpoints, "create", flaky)
    monkeypatch.setattr(writing, "RETRY_SECONDS", (0.01, 0.01))
    run(tiny_training(folder, tmp_path))
    assert not failures
    assert checkpoints.damage(f"{tmp_path}/checkpoints/step-00000010") is None


def test_a_checkpoint_that_is_written_is_not_written_again_where_an_old_one_stays(folder, tmp_path, monkeypatch):
    """While it is, there may be no other."""
    failures, prune, create, written = [OSError("503")] * 2, states.prune_checkpoints, checkpoints.create, []

    def flaky(*arguments, **more):
        if failures:
            raise failures.pop()
        return prune(*arguments, **more)

    def noted(uri, *arguments, **more):
        written.append(checkpoints.step_of(uri))
        return create(uri, *arguments, **more)

    monkeypatch.setattr(states, "prune_checkpoints", flaky)
    monkeypatch.setattr(checkpoints, "create", noted)
    monkeypatch.setattr(writing, "RETRY_SECONDS", (0.01, 0.01))
    run(tiny_training(folder, tmp_path, keep_last=1))
    assert not failures
    assert written == [0, 10, 20]
    assert [checkpoints.step_of(uri) for uri in checkpoints.list_finished(str(tmp_path))] == [20]


def test_latents_are_read_when_the_store_answers_again(folder, tmp_path, monkeypatch):
    """A store that does not answer is waited for; it is no reason to call the latents damaged."""
    failures, reading = [OSError("503")] * 3, latents._read_columns

    def flaky(*arguments):
        if failures:
            raise failures.pop()
        return reading(*arguments)

    monkeypatch.setattr(latents, "_read_columns", flaky)
    monkeypatch.setattr(latents, "RETRY_SECONDS", (0.01,) * 3)
    assert run(tiny_training(folder, tmp_path, num_steps=2)).step == 2
    failures[:] = [OSError("503")] * 99
    with pytest.raises(OSError, match=r"could not be read \(503\); mend the access"):
        run(tiny_training(folder, tmp_path, num_steps=4))


def test_a_resume_reads_each_file_of_a_checkpoint_once(folder, monkeypatch):
    """For its checksum, and to load it."""
    s3.give_keys(monkeypatch)
    with s3.serve() as store, s3.forwarded(store) as line:
        run(tiny_training(folder, line.uri("run"), num_steps=5))
        line.requests.clear()
        assert run(tiny_training(folder, line.uri("run"), num_steps=6)).step == 6
        assert line.requests.count(f"GET /{s3.BUCKET}/run/checkpoints/step-00000005/optimizer.pt") == 1


# Damaged checkpoints


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["optimizer.pt", "checksums.json", "an empty checksums.json", "a missing file"])
def test_a_damaged_checkpoint_is_passed_over_and_takes_no_place(folder, tmp_path, what, caplog):
    config = tiny_training(folder, tmp_path, num_steps=20, keep_last=2)
    run(config)
    newest = tmp_path / "checkpoints" / "step-00000020"
    if what == "a missing file":
        (newest / "optimizer.pt").unlink()
    elif what.startswith("an empty"):
        (newest / "checksums.json").write_text("")
    else:
        damage(newest / what)
    unfinished = tmp_path / "checkpoints" / "step-00000015"
    unfinished.mkdir()
    resumed = run(dataclasses.replace(config, num_steps=17, keep_last=1))
    assert resumed.step == 17
    assert "step-00000020 is damaged" in caplog.text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000017"]


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(folder, tmp_path):
    run(tiny_training(folder, tmp_path, num_steps=5))
    for path in tmp_path.glob("checkpoints/*/optimizer.pt"):
        damage(path)
    with pytest.raises(ValueError, match=r"none of its 2 checkpoints is whole; bring one back, or delete the folder"):
        run(tiny_training(folder, tmp_path))
    assert len(list(tmp_path.glob("checkpoints/*/optimizer.pt"))) == 2


def test_writes_keep_their_order_and_their_errors_come_out():
    order = []

    def slow():
        time.sleep(0.2)
        order.append("first")

    with Writer() as writer:
        writer.submit(slow)
        writer.submit(lambda: order.append("second"))
    assert order == ["first", "second"]
    with pytest.raises(ZeroDivisionError), Writer() as writer:
        writer.submit(lambda: 1 / 0)


@pytest.mark.parametrize("kind", ["mdt_v1", "dit"])
def test_a_snapshot_is_a_whole_copy(folder, tmp_path, kind):
    model = dataclasses.replace(tiny_training(folder, tmp_path).model, kind=kind)
    loss = LossConfig(passes="full") if kind == "dit" else LossConfig()
    state = run(tiny_training(folder, tmp_path, num_steps=3, model=model, loss=loss))
    before = [parameter.clone() for parameter in state.model.parameters()]
    write = states.snapshot(state, str(tmp_path / "copy"), {}, {})
    with torch.no_grad():
        for parameter in (*state.model.parameters(), *state.ema.parameters()):
            parameter.zero_()
    state.optimizer.state_dict()["state"][0]["exp_avg"].zero_()
    states.restore(state, Path(write()))
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    assert any(parameter.any() for parameter in state.ema.parameters())
    assert state.optimizer.state_dict()["state"][0]["exp_avg"].any()
