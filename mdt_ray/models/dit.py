"""Diffusion Transformer (arXiv 2212.09748), the baseline: no masking, no relative bias, fixed positions.

B batch, L tokens, D width, C latent channels, h x w latent size.
"""

from typing import ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from mdt_ray.models import layers


class DiT(ModelMixin, ConfigMixin):
    """The denoiser eps, v = DiT(x_t, t, y). Arguments and errors as for MDT, without its decoder and masking."""

    _no_split_modules: ClassVar = ["Block"]
    _repeated_blocks: ClassVar = ["Block"]
    _supports_gradient_checkpointing: ClassVar = True

    @register_to_config
    def __init__(self, input_size: int | tuple[int, int] = 32, patch_size: int = 2, in_channels: int = 4,
                 hidden_size: int = 384, depth: int = 12, num_heads: int = 6, mlp_ratio: float = 4.0,
                 num_classes: int = 1000, class_dropout_prob: float = 0.1):
        super().__init__()
        self.grid = layers.token_grid(input_size, patch_size)
        self.gradient_checkpointing = False
        self.x_embedder = layers.PatchEmbed(in_channels, patch_size, hidden_size)
        self.t_embedder = layers.TimestepEmbedder(hidden_size)
        self.y_embedder = layers.LabelEmbedder(num_classes, hidden_size, class_dropout_prob) if num_classes else None
        self.blocks = nn.ModuleList(layers.Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = layers.FinalLayer(hidden_size, patch_size, 2 * in_channels)
        self.register_buffer("pos_embed", layers.sincos_positions(hidden_size, self.grid))
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation: adaLN-Zero."""
        self.apply(layers.init_linear)
        layers.init_embedders(self)
        for block in (*self.blocks, self.final_layer):
            block.init_zero()

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None,
                mask: None = None) -> torch.Tensor:
        """Noisy latents x (B, C, h, w), timesteps t (B,), labels y (B,) -> (B, 2C, h, w).

        Raises ValueError for wrong shapes, and for a mask: DiT has no masked pass.
        """
        if mask is not None:
            raise ValueError("mask: DiT has no masked pass; use MDT, or pass mask=None")
        layers.check_inputs(self, x, t, y)
        c = layers.condition(self, t, y)  # (B, D)
        x = self.x_embedder(x) + self.pos_embed  # (B, L, D)
        for block in self.blocks:
            x = layers.call(self, block, x, block.adaLN_modulation(c))  # (B, L, D)
        x = self.final_layer(x, c)  # (B, L, p p 2C)
        return layers.unpatchify(x, self.grid, self.config.patch_size)
