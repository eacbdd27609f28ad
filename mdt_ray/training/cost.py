"""What a training step takes, counted on the real modules with tensors that have shapes but no memory.

Operations and bytes, no times: nothing is run, on a GPU or elsewhere.

B images, L tokens, H heads.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mdt_ray.config import ModelConfig, TrainConfig
from mdt_ray.data.loader import Batch
from mdt_ray.diffusion.loss import schedule
from mdt_ray.models import MDT, DiT
from mdt_ray.models.layers import KEY_MULTIPLE
from mdt_ray.training.ema import updates
from mdt_ray.training.optim import build_optimizer
from mdt_ray.training.step import TrainingStep, build_model, keep_inputs_only

FEW, MORE = 2, 4
"""Images of the two batches that show what activations take an image, and what once. (Of one image, torch keeps copies that
it does not keep of several.)"""


@dataclass(frozen=True)
class Cost:
    """Operations (2 a multiply-add) and bytes of a training run."""

    num_parameters: int
    num_inference_parameters: int
    """Without the parts for the masked pass."""
    inference_flops: int
    """Of an image, full pass, forward."""
    training_flops: int
    """Of an image: the config's passes, forward and backward, at the mean of the mask ratio's span."""
    model_bytes: int
    """Weights and buffers; each of the averages takes the same."""
    num_averages: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Of an image, kept for the backward pass at the smallest mask ratio."""
    fixed_activation_bytes: int
    """Kept once for any number of images: under autocast, the weights in bf16."""
    checkpoint_bytes: int
    """model/, ema/, further averages and optimizer.pt."""
    snapshot_bytes: int
    """Of the power-function averages, at one step."""
    fused_attention: bool
    """Whether the attention of a GPU keeps no (B, H, L, L) matrix."""

    def activations(self, num_images: int) -> int:
        """Bytes that the passes over so many images keep."""
        return self.fixed_activation_bytes + num_images * self.activation_bytes

    def memory(self, num_images: int) -> dict[str, int]:
        """Bytes of one rank by what they are for.

        Their sum is above the peak in that gradients come as activations go, and below it by temporaries.
        """
        return {"weights": self.model_bytes, "EMA": self.num_averages * self.model_bytes,
                "optimiser": self.optimizer_bytes, "gradients": self.gradient_bytes,
                "activations": self.activations(num_images)}


def count(config: TrainConfig, dtype: torch.dtype | None, on_gpu: bool) -> Cost:
    """The cost of `config`, whose model is complete.

    Args:
        dtype: of autocast; None is float32.
        on_gpu: count what CUDA would keep for the backward pass, else what the CPU keeps.
    Raises ValueError as the model's constructor and `num_kept`.
    """
    with torch.device("meta"):
        bare, model = build_model(config.model, "full"), build_model(config.model, config.loss.passes)
    with shapes_only():
        bare, model = bare.to_empty(device="cpu"), model.to_empty(device="cpu").train()
        if config.gradient_checkpointing:
            keep_inputs_only(model)
        one = example_batch(config.model, 1, mask_ratio_draw=0.5)
        # The fused kernels of the CPU are unknown to the counter, those of CUDA do part of the work twice.
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as inference, torch.no_grad():
                bare(one.x_0, one.t, one.y_full)
            with FlopCounterMode(display=False) as training:
                losses = TrainingStep(model, config.loss, dtype)(one)
                sum(losses[name].sum() for name in ("full", "masked") if name in losses).backward()
        optimizer = build_optimizer(model, config.optim)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step = TrainingStep(model, config.loss, dtype)
        cuda = CudaChoices()
        with cuda if on_gpu else contextlib.nullcontext():
            few, more = (saved_bytes(step, example_batch(config.model, number, 0.0)) for number in (FEW, MORE))
        optimizer_bytes = sum(_bytes(v) for state in optimizer.state.values() for v in state.values())
        each = (more - few) // (MORE - FEW)
        num_averages, saved = len(updates(0, config.ema)), sum(map(_bytes, model.state_dict().values()))
        return Cost(
            num_parameters=_size(model), num_inference_parameters=_size(bare), training_flops=training.get_total_flops(),
            inference_flops=inference.get_total_flops(), fused_attention=cuda.fused, activation_bytes=each,
            fixed_activation_bytes=few - FEW * each, optimizer_bytes=optimizer_bytes,
            model_bytes=sum(map(_bytes, (*model.parameters(), *model.buffers()))),
            gradient_bytes=sum(_bytes(p) for p in model.parameters() if p.requires_grad),
            num_averages=num_averages, checkpoint_bytes=(1 + num_averages) * saved + optimizer_bytes,
            snapshot_bytes=len(config.ema.power_stds) * saved)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Tensors made here have shapes, dtypes and storages, but no numbers and no memory."""
    schedule(torch.device("cpu"))  # kept for the process at its first use: not to be made of tensors without numbers
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def example_batch(model: ModelConfig, num_images: int, mask_ratio_draw: float) -> Batch:
    """A batch for `model`, of any numbers."""
    side = model.input_size
    x = torch.zeros(num_images, model.in_channels, side, side)
    y = torch.zeros(num_images, dtype=torch.int64)
    return Batch(step=0, images=y, x_0=x, t=y, eps_full=x, eps_masked=x, y_full=y, y_masked=y,
                 mask_noise=torch.zeros(num_images, (side // model.patch_size) ** 2), mask_ratio_draw=mask_ratio_draw)


def saved_bytes(step: TrainingStep, batch: Batch) -> int:
    """Bytes that the passes over a batch keep for the backward pass, every storage once; without weights and buffers.

    With gradient checkpointing: the inputs of all blocks, and what the block keeps that is being computed again.
    """
    held = {_storage(tensor) for tensor in (*step.parameters(), *step.buffers())}
    saved, largest = {}, 0

    def add(tensor: torch.Tensor, kept: dict) -> None:
        if _storage(tensor) not in held | saved.keys():
            kept[_storage(tensor)] = tensor.untyped_storage()  # held, so that no other gets its address

    def watched(kept: dict) -> torch.autograd.graph.saved_tensors_hooks:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            add(tensor, kept)
            return tensor.detach()

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def keep(block: torch.nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
        nonlocal largest
        for tensor in inputs:
            if tensor is not None:
                add(tensor, saved)
        once = {}
        with watched(once):
            block(*inputs)
        largest = max(largest, sum(storage.nbytes() for storage in once.values()))
        return again(block, *inputs)

    again = step.model._gradient_checkpointing_func if step.model.gradient_checkpointing else None
    if again:
        step.model.enable_gradient_checkpointing(keep)
    with watched(saved):
        step(batch)
    if again:
        step.model.enable_gradient_checkpointing(again)
    return largest + sum(storage.nbytes() for storage in saved.values())


class CudaChoices(TorchFunctionMode):
    """Where CUDA keeps other tensors than the CPU, for counting without a GPU: layer-norm under autocast, and attention.

    Autocast on CUDA takes layer-norm to float32. Attention's fused kernels refuse a bias whose keys do not lie side by side
    (check_last_dim_stride_equals_1_dense in PyTorch's sdp_utils_cpp.h); PyTorch then computes, and keeps, the
    (B, H, L, L) matrix. The memory-efficient kernel stands for all fused ones: they keep q, k, v, bias, output and row sums.
    """

    def __init__(self):
        super().__init__()
        self.fused = True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            return func(args[0].float(), *args[1:], **kwargs)
        if func == torch.Tensor.is_cuda.__get__:  # (a new object each time)
            return True
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        (q, k, v), bias = args, kwargs["attn_mask"]
        if bias is not None and bias.stride(-1) != 1:
            self.fused = False
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        if bias is not None:
            num_keys = k.shape[2]
            if bias.stride(-2) % KEY_MULTIPLE:  # PyTorch pads it
                bias = F.pad(bias, (0, -num_keys % KEY_MULTIPLE))[..., :num_keys]
            bias = bias.expand(*q.shape[:3], num_keys)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, compute_log_sumexp=True)[0]


def _size(model: MDT | DiT) -> int:
    return sum(p.numel() for p in model.parameters())


def _bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
