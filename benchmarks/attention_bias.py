"""Attention with a learned relative position bias, forward and backward: which kernel is fastest on this device?

    python benchmarks/attention_bias.py [--quick]

The shapes of MDT-XL/2 in bf16: batch 256, 16 heads, 256 tokens in the full pass, 179 in the masked one (padded to 184 and
narrowed, as the memory-efficient kernel wants its bias), head width 72. The bias table's gradient is part of the time. On a
CPU the shapes are small, and only show that every variant runs and agrees.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mdt_ray.models import layers, sample_mask

Tensors = tuple[torch.Tensor, ...]
# An `attend` maps q, k, v (B, H, L, d), the bias table (rows, H) and its row for every pair, (L, L) or (B, L, L), to
# (B, H, L, d).


def gathered(table: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the table for every pair, padded to a multiple of 8 keys and narrowed: (B or 1, H, L, L)."""
    length = positions.shape[-1]
    padded = F.pad(positions, (0, -length % 8))
    bias = F.embedding(padded, table.to(dtype)).movedim(-1, -3).contiguous()  # (..., H, L, L + pad)
    return (bias if bias.ndim == 4 else bias[None])[..., :length]


def with_backend(backend: SDPBackend) -> Callable:
    def attend(q, k, v, table, positions):
        bias = gathered(table, positions, q.dtype).expand(q.shape[0], -1, -1, -1)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attend


def as_the_model_does(q, k, v, table, positions):
    """A copy of the table a sample, keys added on GPUs; PyTorch chooses the kernel."""
    return layers.attend(q, k, v, layers.position_bias(table, layers.aligned(positions)).to(q.dtype))


def explicit(q, k, v, table, positions):
    """softmax(q k^T / sqrt(d) + B) v, to be compiled."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + gathered(table, positions, q.dtype)
    return scores.softmax(dim=-1) @ v


def flex(q, k, v, table, positions):
    """FlexAttention that reads the table inside its kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    positions = positions if positions.ndim == 3 else positions[None]
    several = positions.shape[0] > 1

    def add_bias(score, b, h, i, j):
        return score + table[positions[b if several else 0, i, j], h]

    return flex_attention(q, k, v, score_mod=add_bias)


def variants() -> dict[str, Callable]:
    return {"as the model does": as_the_model_does,
            "as it does, compiled": torch.compile(as_the_model_does, dynamic=False),
            "memory-efficient": with_backend(SDPBackend.EFFICIENT_ATTENTION),
            "cuDNN": with_backend(SDPBackend.CUDNN_ATTENTION), "math": with_backend(SDPBackend.MATH),
            "explicit, compiled": torch.compile(explicit, dynamic=False),
            "flex, compiled": torch.compile(flex, dynamic=False)}


def step(attend: Callable, tensors: Tensors, positions: torch.Tensor) -> Tensors:
    """Forward and backward; returns the output and the table's gradient."""
    for tensor in tensors:
        tensor.grad = None
    out = attend(*tensors, positions)
    out.float().square().mean().backward()
    return out.detach(), tensors[3].grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    batch, heads, side, width = (256, 16, 16, 72) if on_gpu else (2, 2, 8, 24)
    generator = torch.Generator(device).manual_seed(0)
    index = layers.relative_position_index((side, side)).to(device)
    masked = sample_mask(batch, side * side, 0.3, generator).pairs(index)
    figures = {}
    for passes, positions in (("full", index), ("masked", masked)):
        length = positions.shape[-1]
        dtype = torch.bfloat16 if on_gpu else torch.float32
        q, k, v = (torch.randn(batch, heads, length, width, device=device, dtype=dtype, generator=generator).requires_grad_()
                   for _ in range(3))
        table = torch.randn((2 * side - 1) ** 2, heads, device=device, generator=generator).requires_grad_()
        expected = step(with_backend(SDPBackend.MATH), (q, k, v, table), positions)
        for name, attend in variants().items():
            try:
                found = step(attend, (q, k, v, table), positions)
                errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]
                times = []
                for _ in range(3 if arguments.quick or not on_gpu else 20):
                    start = time.perf_counter()
                    step(attend, (q, k, v, table), positions)
                    if on_gpu:
                        torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)
            except Exception as error:  # a kernel that this device lacks is an answer, not a failure
                print(f"{passes:<7} {name:<20} not on this device: {str(error).strip().splitlines()[0][:90]}")
                continue
            figures[f"{passes}_{name}_ms"] = statistics.median(times) * 1e3
            print(f"{passes:<7} {name:<20} {figures[f'{passes}_{name}_ms']:9.2f} ms   error of output {errors[0]:.1e}, "
                  f"of the table's gradient {errors[1]:.1e}")
    machine = torch.cuda.get_device_name() if on_gpu else platform.machine()
    figures = {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps({"name": "attention_bias", "machine": machine, "figures": figures}))


if __name__ == "__main__":
    main()
