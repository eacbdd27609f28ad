"""The parts that MDT and DiT are made of. No model here.

B batch, L tokens in a grid of rows x columns, D width, H heads, C latent channels, h x w latent size, p patch size.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def init_linear(module: nn.Module) -> None:
    """DiT's basic initialisation: xavier-uniform weights, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


Grid = tuple[int, int]
"""Rows and columns of tokens."""
KEY_MULTIPLE = 8
"""GPUs' kernels read a bias whose rows lie a multiple of this apart. PyTorch copies any other one in every block, and in the
backward pass of a compiled block refuses it."""


def sincos_positions(width: int, grid: Grid) -> torch.Tensor:
    """Fixed 2-D sine-cosine table of MAE: half the features for the column, half for the row. (1, rows columns, width)"""
    omega = torch.exp(-math.log(10000) * torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def axis(length: int) -> torch.Tensor:
        angle = torch.arange(length, dtype=torch.float64)[:, None] * omega  # (length, D/4)
        return torch.cat([angle.sin(), angle.cos()], dim=1)  # (length, D/2)

    num_rows, num_columns = grid
    columns = axis(num_columns)[None, :, :].expand(num_rows, -1, -1)  # (rows, columns, D/2)
    rows = axis(num_rows)[:, None, :].expand(-1, num_columns, -1)  # (rows, columns, D/2)
    return torch.cat([columns, rows], dim=2).reshape(1, num_rows * num_columns, width).float()  # (1, L, D)


def num_relative_positions(grid: Grid) -> int:
    """Rows of a relative position bias table: (2 rows - 1)(2 columns - 1)."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def relative_position_index(grid: Grid) -> torch.Tensor:
    """Row of the bias table for (query, key): (dh + rows - 1)(2 columns - 1) + dw + columns - 1, d = query - key. (L, L)"""
    num_rows, num_columns = grid
    row, column = torch.arange(num_rows * num_columns) // num_columns, torch.arange(num_rows * num_columns) % num_columns
    delta_row = row[:, None] - row[None, :] + num_rows - 1  # (L, L)
    delta_column = column[:, None] - column[None, :] + num_columns - 1  # (L, L)
    return delta_row * (2 * num_columns - 1) + delta_column


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Adaptive layer-norm of (B, L, D) with shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    """p x p patches to tokens, row-major; its weight has the shape of a convolution's, as published."""

    def __init__(self, in_channels: int, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))  # as a linear layer on flattened patches
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        p = self.proj.stride[0]
        x = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)  # (B, h/p, w/p, C, p, p)
        # A linear layer, because a convolution's output has its tokens last in memory, and all blocks would inherit that.
        return F.linear(x.reshape(batch, -1, channels * p * p), self.proj.weight.flatten(1), self.proj.bias)  # (B, L, D)


class TimestepEmbedder(nn.Module):
    """Timestep to vector: 256 features [cos | sin], then a two-layer MLP."""

    NUM_FEATURES = 256

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.NUM_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = self.NUM_FEATURES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t[:, None].float() * frequencies  # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))  # (B, D)


class LabelEmbedder(nn.Module):
    """Class label to vector. The null label is row `num_classes`, which exists only if labels are dropped in training."""

    def __init__(self, num_classes: int, width: int, class_dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (class_dropout_prob > 0), width)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(y)  # (B, D)


class Attention(nn.Module):
    """Multi-head self-attention softmax(q k^T / sqrt(d) + B) v, with an optional relative position bias B per head."""

    def __init__(self, width: int, num_heads: int, num_relative_positions: int = 0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = None
        if num_relative_positions:
            self.relative_position_bias_table = nn.Parameter(torch.empty(num_relative_positions, num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, L, D); positions: rows of the bias table, (L, L) or (B, L, L), or with more columns, of keys that nothing
        attends to."""
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, d)
        bias = None
        if self.relative_position_bias_table is not None:
            bias = position_bias(self.relative_position_bias_table, positions).to(q.dtype)
        out = attend(q, k, v, bias)  # (B, H, L, d)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))  # (B, L, D)


def position_bias(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The table's (rows, H) entry of every pair of tokens: positions (L, L) or (B, L, L) -> (1, H, L, L) or (B, H, L, L)."""
    heads_first = table.t().contiguous()  # (H, rows)
    # One short row a head: read, and in the backward pass added up, ten times faster than rows of H numbers. On a GPU a row
    # for each sample too, because a million threads wait for each other to add to the same few numbers.
    copies = len(positions) if positions.is_cuda and positions.ndim == 3 else 1
    rows = positions.reshape(copies, 1, -1).expand(-1, len(heads_first), -1)
    bias = heads_first.expand(copies, -1, -1).gather(2, rows)  # (copies, H, B/copies L L)
    return bias.view(copies, len(heads_first), -1, *positions.shape[-2:]).transpose(1, 2).flatten(0, 1)  # (B, H, L, L)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) v; q, k, v (B, H, L, d), bias (B or 1, H, L, L) or None -> (B, H, L, d). Nothing
    attends to keys that the bias has more."""
    num_added = 0 if bias is None else bias.shape[-1] - k.shape[2]
    if num_added:
        added = torch.arange(bias.shape[-1], device=q.device) >= k.shape[2]
        bias = bias.masked_fill(added, -math.inf)
        k, v = (F.pad(tokens, (0, 0, 0, num_added)) for tokens in (k, v))
    trained = (q.requires_grad and q.dtype == torch.bfloat16) or (bias is not None and bias.requires_grad)
    if q.is_cuda or not trained:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # No fused kernel of the CPU gives a bias its gradient, and what PyTorch then falls back to works in float32 throughout,
    # at half the speed; and in bf16 the fused one's backward pass takes seven times as long as this one's (64 tokens).
    # (In bf16 the output's error is 0.4% to 0.9% so, where it would be 0.2%.)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, L, L)
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ v


def aligned(positions: torch.Tensor) -> torch.Tensor:
    """Rows of the bias table (..., L, L), on GPUs with keys added up to a multiple of KEY_MULTIPLE."""
    padding = -positions.shape[-1] % KEY_MULTIPLE
    return F.pad(positions, (0, padding)) if padding and positions.is_cuda else positions


def gelu(x: torch.Tensor) -> torch.Tensor:
    """tanh-GELU: x (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3) (arXiv 1606.08415)."""
    if torch.compiler.is_compiling() and not x.is_cuda:
        # The same as x sigmoid(2u), which compiled for a CPU takes 40% of the time, at the same error.
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return F.gelu(x, approximate="tanh")


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT); a relative position bias (paper eq. 1) and a long skip (MDTv2)
    where asked."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, num_relative_positions: int = 0, skip: bool = False):
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.attn = Attention(width, num_heads, num_relative_positions)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, modulation: torch.Tensor, positions: torch.Tensor | None = None,
                skip: torch.Tensor | None = None) -> torch.Tensor:
        """x and skip (B, L, D), modulation = adaLN_modulation(condition) (B, 6D), positions as in Attention -> (B, L, D)."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))  # (B, L, D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)  # 6 x (B, D)
        x = x + gate_a[:, None] * self.attn(modulate(layer_norm(x), shift_a, scale_a), positions)
        return x + gate_m[:, None] * self.mlp(modulate(layer_norm(x), shift_m, scale_m))

    def init_zero(self) -> None:
        """adaLN-Zero: the block starts as the identity."""
        nn.init.zeros_(self.adaLN_modulation[1].weight)
        nn.init.zeros_(self.adaLN_modulation[1].bias)


def call(model: nn.Module, block: Block, *inputs: torch.Tensor | None) -> torch.Tensor:
    """The block of a model; with gradient checkpointing on (diffusers' `enable_gradient_checkpointing`), only its inputs are
    kept, and the backward pass computes the rest again."""
    if model.gradient_checkpointing and torch.is_grad_enabled():
        return model._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


class FinalLayer(nn.Module):
    """Tokens to pixels of noise and variance; starts at zero."""

    def __init__(self, width: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # 2 x (B, D)
        return self.linear(modulate(layer_norm(x), shift, scale))  # (B, L, p p C)

    def init_zero(self) -> None:
        for layer in (self.adaLN_modulation[1], self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    """Layer-norm over the width without affine parameters, eps 1e-6 (DiT)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def unpatchify(tokens: torch.Tensor, grid: Grid, patch_size: int) -> torch.Tensor:
    """(B, rows columns, p p C), laid out (p, q, channel), to (B, C, rows p, columns p)."""
    batch, (num_rows, num_columns) = tokens.shape[0], grid
    x = tokens.reshape(batch, num_rows, num_columns, patch_size, patch_size, -1)  # (B, rows, columns, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, num_rows * patch_size, num_columns * patch_size)  # (B, C, h, w)


def init_embedders(model: nn.Module) -> None:
    """Label table and timestep MLP start at N(0, 0.02) (DiT)."""
    if model.y_embedder is not None:
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[0].weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[2].weight, std=0.02)


def condition(model: nn.Module, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    """The condition c of timestep and label, or of the timestep alone in an unconditional model. (B, D)"""
    c = model.t_embedder(t)
    return c if model.y_embedder is None else c + model.y_embedder(y)


def check_inputs(model: nn.Module, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> None:
    """Raise ValueError unless x, t and y have the shapes that the model's config asks for."""
    expected = (x.shape[0], model.config.in_channels, *latent_size(model.config.input_size))
    if tuple(x.shape) != expected:
        raise ValueError(f"x has shape {tuple(x.shape)}: must be {('B', *expected[1:])}, as the model's config says")
    if model.y_embedder is not None and y is None:
        raise ValueError(f"y = None: the model has {model.config.num_classes} classes; give a label for each image")
    for name, value in (("t", t), ("y", y)):
        if value is not None and tuple(value.shape) != (x.shape[0],):
            raise ValueError(f"{name} has shape {tuple(value.shape)}: must be (B,) = ({x.shape[0]},)")


def latent_size(input_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a latent given by its side, or by both."""
    return (input_size, input_size) if isinstance(input_size, int) else (input_size[0], input_size[1])


def token_grid(input_size: int | Sequence[int], patch_size: int) -> Grid:
    """Rows and columns of tokens. Raises ValueError if patches do not tile the latent."""
    height, width = latent_size(input_size)
    if height % patch_size or width % patch_size:
        raise ValueError(f"patch_size = {patch_size}: must divide the latent size {input_size}")
    return height // patch_size, width // patch_size
