"""The training loop without Ray: it learns, resumes bit for bit, skips non-finite steps, keeps its checkpoints whole."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdt_ray import checkpoints, config_io, storage
from mdt_ray.config import LossConfig, ModelConfig, OptimConfig
from mdt_ray.data import latents
from mdt_ray.data.loader import Loader, LoaderConfig
from mdt_ray.models import MDT, DiT
from mdt_ray.run_folder import TakenOver
from mdt_ray.training import loop
from mdt_ray.training.contract import resolve_model
from mdt_ray.training.meters import MACHINE_COLUMNS
from mdt_ray.training.optim import build_optimizer, clip_gradients, learning_rate
from mdt_ray.training.run import run_rank
from mdt_ray.training.state import TrainState
from mdt_ray.training.step import TrainingStep, build_model
from tests.conftest import ROOT
from tests.helpers import make_latents, tiny_training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    make_latents(folder, num_images=130)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(config, **arguments) -> TrainState:
    manifest = latents.open_manifest(config.latents)
    config = dataclasses.replace(config, model=resolve_model(config.model, manifest))
    return run_rank(config, manifest, {"config": config_io.to_dict(config)}, **arguments)


def without_times(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in history]


def assert_equal_states(a: TrainState, b: TrainState) -> None:
    for one, two in ((a.model, b.model), (a.ema, b.ema)):
        assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    first, second = a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"]
    assert all(torch.equal(first[i][k], second[i][k]) for i in first for k in first[i])
    assert without_times(a.history) == without_times(b.history)


# Determinism


def test_straight_equals_resumed_bit_for_bit(folder, tmp_path):
    straight = run(tiny_training(folder, tmp_path / "straight"))
    run(tiny_training(folder, tmp_path / "resumed", num_steps=10))
    resumed = run(tiny_training(folder, tmp_path / "resumed"))
    assert resumed.step == 20
    assert len(straight.history) == 20
    assert_equal_states(straight, resumed)


def test_a_resume_from_the_first_checkpoint_does_not_write_it_again(folder, tmp_path):
    """It is the only one then, and a kill amid the writing would leave none."""
    config = tiny_training(folder, tmp_path / "run", num_steps=2)
    run(config)
    first, *others = checkpoints.list_finished(config.output)
    for uri in others:
        checkpoints.remove(uri)
    written = {p: p.stat().st_mtime_ns for p in Path(first).rglob("*")}
    assert run(config).step == 2
    assert {p: p.stat().st_mtime_ns for p in Path(first).rglob("*")} == written


@pytest.mark.slow
def test_kills_resumes_and_numbers_of_ranks_change_nothing():
    """scripts/resume_exactly.py in processes of its own (3 ranks do not divide the batch), each killed once."""
    done = subprocess.run([sys.executable, "scripts/resume_exactly.py", "--ranks", "1", "2", "3", "4"], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit for bit" in done.stdout


def test_tf32_is_a_mode_of_float32_products_and_fp32_is_without(folder, tmp_path):
    """The mode is the GPU's: on a CPU both are the same to the last bit."""
    states = []
    for precision in ("tf32", "fp32"):
        states.append(run(tiny_training(folder, tmp_path / precision, num_steps=3, precision=precision)))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    assert_equal_states(*states)


def test_the_deterministic_mode_is_on_where_asked_and_only_there(folder, tmp_path):
    """On a CPU it changes no bit."""
    states = []
    for deterministic in (True, False):
        states.append(run(tiny_training(folder, tmp_path / str(deterministic), num_steps=3, deterministic=deterministic)))
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert_equal_states(*states)


@pytest.mark.parametrize("kind", ["mdt_v1", "mdt_v2", "dit"])
def test_gradient_checkpointing_changes_no_bit(folder, tmp_path, kind):
    depth, decode_layer = (6, 2) if kind == "mdt_v2" else (3, 1)
    model = ModelConfig(kind=kind, patch_size=1, hidden_size=32, depth=depth, num_heads=2, decode_layer=decode_layer)
    assert_equal_states(*(run(tiny_training(folder, tmp_path / str(again), num_steps=5, model=model,
                                            gradient_checkpointing=again)) for again in (True, False)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_gives_the_same_bits_where_asked(folder, tmp_path, monkeypatch, precision):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    states = [run(tiny_training(folder, tmp_path / name, precision=precision, deterministic=True), device="cuda")
              for name in ("one", "two")]
    torch.use_deterministic_algorithms(False)
    assert_equal_states(*states)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 0.03)])
def test_a_gpu_takes_the_steps_that_a_cpu_takes(folder, tmp_path, precision, bound, compiled):
    """Losses of every step, from the same random weights; 11 of 16 tokens are kept, which is not what its kernels like."""
    on_cpu = run(tiny_training(folder, tmp_path / "cpu", num_steps=10))
    on_gpu = run(tiny_training(folder, tmp_path / "gpu", num_steps=10, precision=precision, compile=compiled), device="cuda")
    expected = [row["loss"] for row in on_cpu.history]
    assert [row["loss"] for row in on_gpu.history] == pytest.approx(expected, rel=bound)


def test_a_finished_run_does_nothing(folder, tmp_path):
    config = tiny_training(folder, tmp_path, num_steps=10)
    run(config)
    before = (tmp_path / "checkpoints" / "step-00000010" / "checksums.json").stat().st_mtime_ns
    assert run(config).step == 10
    assert (tmp_path / "checkpoints" / "step-00000010" / "checksums.json").stat().st_mtime_ns == before


# Behaviour


@pytest.mark.parametrize("kind", ["mdt_v1", "dit"])
def test_it_learns(folder, tmp_path, kind):
    model = ModelConfig(kind=kind, patch_size=1, hidden_size=32, depth=3, num_heads=2, decode_layer=1)
    optim = OptimConfig(lr=5e-3, clip_norm=1.0)
    state = run(tiny_training(folder, tmp_path, num_steps=60, log_every_steps=20, model=model, optim=optim))
    assert isinstance(state.model, MDT if kind == "mdt_v1" else DiT)
    assert ("loss_masked" in state.history[0]) == (kind == "mdt_v1")
    first, last = state.history[0], state.history[-1]
    assert last["loss_full_mse"] < 0.85 * first["loss_full_mse"]
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize(("passes", "columns"), [
    ("full+masked", {"loss_full", "loss_masked"}), ("full", {"loss_full"}), ("masked", {"loss_masked"})])
def test_passes_are_those_asked_for(folder, tmp_path, passes, columns):
    """Paper Table 5d. Losses are added; without a masked pass the model has no parts for one."""
    state = run(tiny_training(folder, tmp_path, num_steps=3, loss=LossConfig(passes=passes)))
    row = state.history[-1]
    assert columns == row.keys() & {"loss_full", "loss_masked"}
    assert row["loss"] == pytest.approx(sum(row[c] for c in columns))
    assert (state.model.mask_token is None) == (passes == "full")


@pytest.mark.parametrize("options", [
    {"masking": "symmetric"}, {"num_side_blocks": 0}, {"num_side_blocks": 3}, {"masked_shortcut": False},
    {"decode_layer": 0}, {"decoder_positions": False}, {"learnable_positions": False},
    {"relative_position_bias": False}, {"num_classes": 0},
    {"kind": "mdt_v2", "depth": 4, "decode_layer": 2}], ids=str)
def test_every_choice_of_the_model_trains(folder, tmp_path, options):
    base = {"patch_size": 1, "hidden_size": 32, "depth": 3, "num_heads": 2, "decode_layer": 1}
    config = tiny_training(folder, tmp_path, num_steps=2, checkpoint_every_steps=1, model=ModelConfig(**base | options))
    state = run(config)
    for name, value in options.items():
        if name != "kind":
            assert state.model.config[name] == value
    again = run(dataclasses.replace(config, num_steps=3))  # its checkpoint opens
    assert again.step == 3


def test_loss_on_masked_tokens_only(folder, tmp_path):
    """Paper Table 5e: changing what is predicted for kept tokens does not change the masked pass's loss."""
    _, state, step, loader = prepared(folder, tmp_path, loss=LossConfig(tokens="masked", mask_ratio=0.5))
    batch = loader.batch(0)
    hidden = step.mask(batch).hidden.reshape(-1, 1, 4, 4)
    torch.manual_seed(1)
    outputs = [torch.randn(24, 8, 4, 4)] * 3
    outputs[1] = torch.where(hidden, outputs[0], torch.randn(24, 8, 4, 4))
    outputs[2] = torch.where(hidden, torch.randn(24, 8, 4, 4), outputs[0])
    found = []
    for output in outputs:
        state.model.both_passes = lambda *args, output=output, **kwargs: output.repeat(2, 1, 1, 1)
        found.append(step(batch))
    assert torch.allclose(found[0]["masked"], found[1]["masked"])
    assert not torch.isclose(found[0]["masked"], found[2]["masked"]).any()
    assert not torch.isclose(found[0]["full"], found[1]["full"]).any()


def test_the_mask_ratio_is_drawn_from_its_span(tmp_path):
    """MDTv2: a ratio for each step in [0.3, 0.5], the same on all ranks, with kept tokens in multiples of 8."""
    make_latents(tmp_path / "latents", side=8)
    _, _, step, _ = prepared(tmp_path / "latents", tmp_path, loss=LossConfig(mask_ratio_span=0.2))
    manifest = latents.open_manifest(str(tmp_path / "latents"))
    loader_config = LoaderConfig(batch_size=24, num_lanes=12, seed=0, num_classes=10, class_dropout_prob=0.1, num_tokens=64)
    ranks = [Loader(str(tmp_path / "latents"), manifest, loader_config, rank, 3) for rank in range(3)]
    counts = []
    for number in range(40):
        kept = {step.mask(rank.batch(number)).ids_keep.shape[1] for rank in ranks}
        assert len(kept) == 1
        counts += kept
    assert set(counts) == {32, 40}  # of 64: ratio 0.5 keeps 32, 0.3 keeps 44
    assert 8 < counts.count(40) < 32


def test_bf16_stays_near_float32(folder, tmp_path):
    losses = [run(tiny_training(folder, tmp_path / p, precision=p, num_steps=10)).history[-1]["loss"]
              for p in ("fp32", "bf16")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# Non-finite steps


def prepared(folder, output, **changes):
    """State, module and batches of a run, to be trained by hand."""
    config = tiny_training(folder, output, **changes)
    manifest = latents.open_manifest(str(folder))
    config = dataclasses.replace(config, model=resolve_model(config.model, manifest))
    torch.manual_seed(0)
    model = build_model(config.model, config.loss.passes)
    state = TrainState(model=model, ema=copy.deepcopy(model), optimizer=build_optimizer(model, config.optim))
    loader_config = LoaderConfig(batch_size=24, num_lanes=12, seed=0, num_classes=10, class_dropout_prob=0.1, num_tokens=16)
    loader = Loader(str(folder), manifest, loader_config, 0, 1)
    return config, state, TrainingStep(model, config.loss, None), loader


def poisoned(batches, steps):
    for batch in batches:
        yield (dataclasses.replace(batch, x_0=batch.x_0 * float("nan")) if batch.step in steps else batch,)


def train(config, state, module, batches) -> list[dict]:
    rows = []
    loop.train(state, module, batches, config, device=torch.device("cpu"), report=rows.append,
               save=lambda checkpoint, snapshot: None)
    return rows


def test_a_non_finite_step_is_skipped_and_counted(folder, tmp_path):
    config, state, module, loader = prepared(folder, tmp_path, num_steps=3)
    before = [p.clone() for p in state.model.parameters()]
    rows = train(config, state, module, poisoned((loader.batch(s) for s in range(9)), {0}))
    assert [row["skipped_steps"] for row in rows] == [1, 0, 0]
    assert all(torch.isfinite(p).all() for p in state.model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    assert state.optimizer.state_dict()["state"][0]["step"].item() == 2


def test_many_non_finite_steps_in_a_row_end_the_loop(folder, tmp_path):
    config, state, module, loader = prepared(folder, tmp_path, num_steps=50)
    with pytest.raises(loop.NonFiniteSteps, match=r"no finite gradient in the last 20 steps, at step 22"):
        train(config, state, module, poisoned((loader.batch(s) for s in range(99)), set(range(2, 99))))


# Oracle


def test_learning_rate_by_hand():
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule="cosine", schedule_steps=110, final_lr_share=0.1)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(9, config) == pytest.approx(1.0)
    assert learning_rate(60, config) == pytest.approx(0.55)
    assert learning_rate(110, config) == learning_rate(999, config) == pytest.approx(0.1)
    assert learning_rate(5000, OptimConfig(lr=3e-4)) == 3e-4
    falling = OptimConfig(lr=1.0, warmup_steps=10, schedule="inverse_sqrt", schedule_steps=100)
    found = [learning_rate(step, falling) for step in (4, 9, 50, 100, 400, 10_000)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.1])


def test_clipping_scales_to_the_norm():
    model = torch.nn.Linear(3, 3)
    model(torch.ones(1, 3)).sum().backward()
    norm = clip_gradients(model, 0.5)
    assert norm == pytest.approx(12**0.5)
    assert clip_gradients(model, None) == pytest.approx(0.5, abs=1e-5)


# Checkpoints


def test_a_checkpoint_opens_without_training_code(folder, tmp_path):
    state = run(tiny_training(folder, tmp_path, num_steps=10))
    uri = checkpoints.latest(str(tmp_path))
    model = MDT.from_pretrained(f"{uri}/ema", low_cpu_mem_usage=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.ema.state_dict().values(), strict=True))
    optimizer = torch.load(f"{uri}/optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(list(state.model.parameters()))
    assert storage.read_json(f"{uri}/state.json")["step"] == 10
    assert checkpoints.damage(uri) is None


@pytest.mark.parametrize("data", ["{}", "[]", "null", "{", '{"../../x": "0"}'])
def test_checksums_that_are_none_mark_no_checkpoint_as_whole(tmp_path, data):
    (tmp_path / "checksums.json").write_text(data)
    assert "checksums" in checkpoints.damage(str(tmp_path))


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(folder, tmp_path, caplog):
    run(tiny_training(folder, tmp_path))
    newest = tmp_path / "checkpoints" / "step-00000020"
    weights = newest / "model" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert checkpoints.latest(str(tmp_path)).endswith("step-00000010")
    assert "step-00000020 is damaged (model/diffusion_pytorch_model.safetensors does not have its checksum)" in caplog.text


def test_old_checkpoints_are_pruned_and_leftovers_cleared(folder, tmp_path):
    leftover = tmp_path / "checkpoints" / "step-00000005.tmp-123"
    leftover.mkdir(parents=True)
    link = tmp_path / "checkpoints" / "step-last"  # somebody's
    link.symlink_to("step-00000020")
    run(tiny_training(folder, tmp_path, checkpoint_every_steps=4, keep_last=2, keep_every_steps=8))
    names = [uri.rpartition("-")[2] for uri in checkpoints.list_finished(str(tmp_path))]
    assert names == ["00000000", "00000008", "00000016", "00000020"]
    assert not leftover.exists()
    assert link.is_symlink()


def test_a_run_that_lost_its_folder_stops_before_it_writes(folder, tmp_path):
    with pytest.raises(TakenOver, match="another run has taken over"):
        run(tiny_training(folder, tmp_path), may_write=lambda: False)
    assert checkpoints.list_finished(str(tmp_path)) == []


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match="neither a checkpoint nor a training output"):
        checkpoints.resolve(str(tmp_path))


# Bad input


@pytest.mark.parametrize(("changes", "message"), [
    ({"input_size": 8}, r"model.input_size = 8: the latents have 4"),
    ({"in_channels": 3}, r"model.in_channels = 3: the latents have 4"),
    ({"num_classes": 5}, r"model.num_classes = 5: the latents have 10"),
    ({"patch_size": 3}, r"model.patch_size = 3: must divide the latent size 4"),
])
def test_a_model_that_does_not_fit_the_latents_is_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        resolve_model(ModelConfig(**changes), latents.open_manifest(str(folder)))
