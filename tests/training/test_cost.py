"""The cost of training against the paper's numbers, and against what real tensors take."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F

from mdt_ray import config_io, presets
from mdt_ray.config import EmaConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from mdt_ray.diffusion.loss import schedule
from mdt_ray.models import sample_mask
from mdt_ray.training import cost, snapshots, state
from mdt_ray.training.ema import build_averages
from mdt_ray.training.optim import build_optimizer
from mdt_ray.training.state import TrainState
from mdt_ray.training.step import TrainingStep, build_model, keep_inputs_only

LATENT = {"model.input_size": 32, "model.in_channels": 4}
TINY = ModelConfig(input_size=8, in_channels=4, num_classes=10, hidden_size=64, depth=4, num_heads=4)


@functools.cache
def of_preset(name: str) -> cost.Cost:
    return cost.count(config_io.override(presets.preset(name).train, LATENT), None, on_gpu=True)


def tiny(kind: str, **changes) -> TrainConfig:
    v2 = kind == "mdt_v2"
    model = config_io.override(TINY, {"kind": kind, **changes})
    return TrainConfig(model=model, loss=LossConfig(mask_ratio_span=0.2 if v2 else 0.0),
                       optim=OptimConfig(name="adan" if v2 else "adamw"),
                       ema=EmaConfig(more_decays=(0.5,), power_stds=(0.05, 0.1), snapshot_every_steps=1))


def real_step(config: TrainConfig, dtype: torch.dtype | None) -> TrainingStep:
    return TrainingStep(build_model(config.model, config.loss.passes), config.loss, dtype)


# Oracle


@pytest.mark.parametrize(("name", "macs", "parameters"), [
    ("s-2", 6.07e9, 33_130_856), ("dit-s-2", 6.06e9, 32_865_056),
    pytest.param("b-2", 23.02e9, 130_847_408, marks=pytest.mark.slow),
    pytest.param("xl-2", 118.69e9, 675_855_072, marks=pytest.mark.slow),
    pytest.param("dit-xl-2", 118.64e9, 674_834_720, marks=pytest.mark.slow),
])
def test_the_inference_model_is_the_papers(name, macs, parameters):
    """Paper Table 6, multiply-adds at 32x32x4; exact parameter counts as in test_models.py."""
    found = of_preset(f"imagenet256-{name}")
    assert found.inference_flops / 2 == pytest.approx(macs, rel=0.005)
    assert found.num_inference_parameters == parameters


@pytest.mark.slow
def test_both_passes_of_xl_take_1243_gflop():
    """Counted by hand for the published method: full and masked pass at ratio 0.3, the backward twice the forward."""
    assert of_preset("imagenet256-xl-2").training_flops == pytest.approx(1243e9, rel=0.01)


def test_a_dit_trains_three_times_its_inference():
    found = of_preset("imagenet256-dit-s-2")
    assert found.training_flops == pytest.approx(3 * found.inference_flops, rel=0.005)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["mdt_v1", "mdt_v2", "dit"])
def test_activations_are_those_of_real_tensors(kind, dtype):
    config = tiny(kind)
    found = cost.count(config, dtype, on_gpu=False)
    step = real_step(config, dtype)
    for num_images in (cost.FEW, 9):  # 9 was not counted
        real = cost.saved_bytes(step, cost.example_batch(config.model, num_images, 0.0))
        assert found.activations(num_images) == pytest.approx(real, rel=0.002)
    assert found.fixed_activation_bytes > 0 if dtype else found.fixed_activation_bytes < 0.01 * real


@pytest.mark.parametrize("kind", ["mdt_v1", "mdt_v2", "dit"])
def test_gradient_checkpointing_keeps_inputs_and_does_the_forward_pass_twice(kind):
    config = tiny(kind)
    without = cost.count(config, None, on_gpu=False)
    found = cost.count(dataclasses.replace(config, gradient_checkpointing=True), None, on_gpu=False)
    tokens = 16 * config.model.hidden_size * 4
    blocks = config.model.depth * (1 if kind == "dit" else 2)
    inputs, one_block = 0.69 * blocks * tokens, without.activation_bytes / blocks  # (of the masked pass, 11 of 16 tokens)
    assert inputs + one_block < found.activation_bytes < without.activation_bytes / 2
    assert found.training_flops == pytest.approx(without.training_flops * 4 / 3, rel=0.05)
    assert found.inference_flops == without.inference_flops
    step = real_step(config, None)
    keep_inputs_only(step.model)
    real = cost.saved_bytes(step, cost.example_batch(config.model, 9, 0.0))
    assert found.activations(9) == pytest.approx(real, rel=0.002)


@pytest.mark.parametrize("kind", ["mdt_v1", "mdt_v2", "dit"])
def test_weights_gradients_and_state_are_those_of_a_real_step(kind, tmp_path):
    config = tiny(kind)
    found = cost.count(config, None, on_gpu=False)
    step = real_step(config, None)
    model, optimizer = step.model, build_optimizer(step.model, config.optim)
    losses = step(cost.example_batch(config.model, 2, 0.5))
    sum(losses[name].sum() for name in ("full", "masked") if name in losses).backward()
    optimizer.step()

    def size(tensors) -> int:
        return sum(t.untyped_storage().nbytes() for t in tensors)

    averages = build_averages(model, config.ema)
    ema = averages.pop("ema")
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert found.model_bytes == size([*model.parameters(), *model.buffers()]) == size([*ema.parameters(), *ema.buffers()])
    assert found.gradient_bytes == size(p.grad for p in model.parameters())
    assert found.optimizer_bytes == size(v for values in optimizer.state.values() for v in values.values())
    assert found.memory(1)["EMA"] == 4 * found.model_bytes
    trained = TrainState(model, ema, optimizer, step=1, more_ema=averages)
    state.save_checkpoint(trained, str(tmp_path / "out"), {}, {})
    snapshots.save_snapshot(trained, str(tmp_path / "out"), config.ema, {})()

    def written(kind: str) -> int:
        return sum(f.stat().st_size for f in (tmp_path / "out" / kind).rglob("*") if f.is_file())

    assert found.checkpoint_bytes == pytest.approx(written("checkpoints"), rel=0.05)  # headers and names, small in a larger
    assert found.snapshot_bytes == pytest.approx(written("ema_snapshots"), rel=0.05)


# Invariant


@pytest.mark.parametrize(("layout", "fused"), [("keys last", True), ("heads last", False), ("none", True)])
def test_attention_keeps_its_matrix_only_for_a_bias_that_cuda_refuses(layout, fused):
    """Saved by hand: q, k, v, the output, sums padded to 64 queries, and the bias, whose 60 keys are padded to 64."""
    batch, heads, length, width = 2, 4, 60, 32
    cuda, saved = cost.CudaChoices(), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with cost.shapes_only():
        q, k, v = (torch.zeros(batch, heads, length, width, requires_grad=True) for _ in range(3))
        bias = {"keys last": torch.zeros(batch, heads, length, length, requires_grad=True),
                "heads last": torch.zeros(batch, length, length, heads, requires_grad=True).movedim(-1, 1),
                "none": None}[layout]
        with cuda, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert out.shape == q.shape
    assert cuda.fused == fused
    matrix, rows = 4 * batch * heads * length * length, 4 * batch * heads * length * width
    sums = 4 * batch * heads * 64
    if fused:
        padded = 0 if bias is None else 4 * batch * heads * length * 64
        assert sum(saved.values()) == pytest.approx(4 * rows + padded + sums, abs=64)
    else:
        assert sum(saved.values()) >= 3 * rows + matrix


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_bias_of_a_masked_pass_needs_no_copy_on_a_gpu(dtype):
    """44 of 64 tokens are kept and 4 keys added; and the result is what it is on a CPU."""
    seen = []

    class Gpu(cost.CudaChoices):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                seen.append((kwargs["attn_mask"].shape[-1], kwargs["attn_mask"].stride()[-2:]))
                return func(*args, **kwargs)
            return super().__torch_function__(func, types, args, kwargs)

    model = build_model(tiny("mdt_v1", patch_size=1).model)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 2])
    mask = sample_mask(2, 64, 0.3)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        expected = model(x, t, y, mask=mask)
        with Gpu():
            found = model(x, t, y, mask=mask)
    assert set(seen) == {(48, (48, 1)), (64, (64, 1))}
    torch.testing.assert_close(found, expected, **({"rtol": 0.05, "atol": 0.05} if dtype else {}))


def test_a_model_without_bias_has_fused_attention():
    assert cost.count(tiny("dit"), None, on_gpu=True).fused_attention


def test_the_smallest_mask_ratio_decides_on_memory_and_the_mean_one_on_operations():
    """MDTv2 draws the ratio of every step. Of 16 tokens, 0.25 keeps 12, made a multiple of 8: as many as 0.5."""
    fixed, spanned = (config_io.override(tiny("mdt_v1"), {"loss.mask_ratio": 0.0, "loss.mask_ratio_span": span})
                      for span in (0.0, 0.5))
    half = config_io.override(fixed, {"loss.mask_ratio": 0.5})
    fixed, spanned, half = (cost.count(config, None, on_gpu=False) for config in (fixed, spanned, half))
    assert spanned.training_flops == half.training_flops < fixed.training_flops
    assert spanned.activation_bytes == fixed.activation_bytes > half.activation_bytes


def test_counting_leaves_no_tensors_without_numbers_behind():
    """The tables of the diffusion process are made once in a process."""
    schedule.cache_clear()
    cost.count(tiny("dit"), None, on_gpu=False)
    assert schedule(torch.device("cpu")).log_betas[0].item() == pytest.approx(-9.2103, abs=1e-3)
