"""The baseline of train_step.py: an MDT training step in eager fp32, written the way the published system works.

Not fast on purpose: two separate forwards, attention as softmax(q k^T + B) v with B repeated over the batch and gathered
twice in every block, a loop over the parameters for the moving average and for AdamW. Written from the paper and its
description; parameters have the names of `mdt_ray.models.MDT`, so that weights can be exchanged and losses compared.

B batch, L tokens, K kept, D width, H heads.
"""

import torch
from torch import nn

from mdt_ray.data.loader import Batch
from mdt_ray.diffusion import q_sample, training_losses
from mdt_ray.models import MDT, layers

Ids = torch.Tensor | None


def gather_tokens(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B, L, D) and ids (B, K) -> (B, K, D)."""
    return torch.gather(x, 1, ids[:, :, None].repeat(1, 1, x.shape[2]))


class PatchEmbed(nn.Module):
    """p x p patches to tokens by a convolution."""

    def __init__(self, in_channels: int, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Explicit attention; `ids` are the kept tokens of a masked pass."""

    def __init__(self, width: int, num_heads: int, grid: layers.Grid):
        super().__init__()
        self.num_heads, self.length = num_heads, grid[0] * grid[1]
        self.scale = (width // num_heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.empty(layers.num_relative_positions(grid), num_heads))
        self.register_buffer("index", layers.relative_position_index(grid), persistent=False)

    def bias(self, batch: int, ids: Ids) -> torch.Tensor:
        bias = self.relative_position_bias_table[self.index.reshape(-1)]
        bias = bias.reshape(self.length, self.length, self.num_heads).permute(2, 0, 1).contiguous()[None]  # (1, H, L, L)
        if ids is None:
            return bias
        bias = bias.repeat(batch, 1, 1, 1)  # (B, H, L, L)
        rows = ids[:, None, :, None].repeat(1, self.num_heads, 1, self.length)
        bias = torch.gather(bias, 2, rows)  # (B, H, K, L)
        columns = ids[:, None, None, :].repeat(1, self.num_heads, ids.shape[1], 1)
        return torch.gather(bias, 3, columns)  # (B, H, K, K)

    def forward(self, x: torch.Tensor, ids: Ids = None) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B, H, K, d)
        scores = (q @ k.transpose(-2, -1)) * self.scale
        scores = scores + self.bias(batch, ids)
        out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """adaLN-Zero transformer block, its norms without parameters."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, grid: layers.Grid):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads, grid)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = layers.Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor, ids: Ids = None) -> torch.Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(self.norm1(x) * (1 + scale_a.unsqueeze(1)) + shift_a.unsqueeze(1), ids)
        return x + gate_m.unsqueeze(1) * self.mlp(self.norm2(x) * (1 + scale_m.unsqueeze(1)) + shift_m.unsqueeze(1))


class PublishedMDT(nn.Module):
    """MDT version 1 with the weights of `ours`."""

    def __init__(self, ours: MDT):
        super().__init__()
        config, grid, width = ours.config, ours.grid, ours.config.hidden_size
        self.grid, self.patch_size, self.num_encoder = grid, config.patch_size, config.depth - config.decode_layer

        def blocks(number: int) -> nn.ModuleList:
            return nn.ModuleList(Block(width, config.num_heads, config.mlp_ratio, grid) for _ in range(number))

        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, width)
        self.t_embedder = layers.TimestepEmbedder(width)
        self.y_embedder = layers.LabelEmbedder(config.num_classes, width, config.class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], width))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks, self.sideblocks = blocks(config.depth), blocks(config.num_side_blocks)
        self.final_layer = layers.FinalLayer(width, config.patch_size, 2 * config.in_channels)
        self.load_state_dict(ours.state_dict())

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, mask_noise: Ids = None,
                mask_ratio: float = 0.0) -> torch.Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        ids_keep = ids_restore = hidden = None
        if mask_noise is not None:
            ids_shuffle = torch.argsort(mask_noise, dim=1)
            ids_restore = torch.argsort(ids_shuffle, dim=1)
            kept = int(x.shape[1] * (1 - mask_ratio))
            ids_keep = ids_shuffle[:, :kept]
            hidden = torch.ones(mask_noise.shape, device=x.device)
            hidden[:, :kept] = 0
            hidden = torch.gather(hidden, 1, ids_restore)
            x = gather_tokens(x, ids_keep)
        for block in self.blocks[:self.num_encoder]:
            x = block(x, c, ids_keep)
        if ids_restore is not None:
            filling = self.mask_token.repeat(x.shape[0], ids_restore.shape[1] - x.shape[1], 1)
            x = gather_tokens(torch.cat([x, filling], dim=1), ids_restore)
        x = x + self.decoder_pos_embed
        if hidden is not None:
            predicted = x
            for block in self.sideblocks:
                predicted = block(predicted, c)
            x = hidden.unsqueeze(-1) * predicted + (1 - hidden.unsqueeze(-1)) * x
        for block in self.blocks[self.num_encoder:]:
            x = block(x, c)
        return layers.unpatchify(self.final_layer(x, c), self.grid, self.patch_size)


class PublishedStep:
    """Both passes, their backward, AdamW and the moving average, one parameter after the other."""

    def __init__(self, ours: MDT, mask_ratio: float, ema_decay: float = 0.9999):
        self.model, self.average = (PublishedMDT(ours).to(ours.device) for _ in range(2))
        self.average.requires_grad_(False)
        self.mask_ratio, self.ema_decay = mask_ratio, ema_decay
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0, foreach=False, fused=False)

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.losses(batch).mean()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True):
                average.mul_(self.ema_decay).add_(parameter, alpha=1 - self.ema_decay)
        return loss

    def losses(self, batch: Batch) -> torch.Tensor:
        """Sum of the losses of both passes, (B,)."""
        x_full = q_sample(batch.x_0, batch.t, batch.eps_full)
        full = training_losses(self.model(x_full, batch.t, batch.y_full), batch.x_0, x_full, batch.eps_full, batch.t)
        x_masked = q_sample(batch.x_0, batch.t, batch.eps_masked)
        output = self.model(x_masked, batch.t, batch.y_masked, batch.mask_noise, self.mask_ratio)
        return full["loss"] + training_losses(output, batch.x_0, x_masked, batch.eps_masked, batch.t)["loss"]
