"""Masked Diffusion Transformer, version 1 (arXiv 2303.14389, section 4.3).

A DiT with learnable positions and relative position biases. In the masked pass of training the encoder sees only the kept
tokens, and the side-interpolator predicts the hidden ones for the decoder; without a mask the side-interpolator is skipped.

B batch, L tokens, K kept, D width, C latent channels, h x w latent size.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from mdt_ray.models import layers
from mdt_ray.models.masking import Mask


class MDT(ModelMixin, ConfigMixin):
    """The denoiser eps, v = MDT(x_t, t, y); output channels are the noise, then the variance interpolation.

    Args:
        input_size: side of the latent, h = w.
        patch_size: side of a token in latent pixels; must divide input_size.
        in_channels: latent channels C.
        hidden_size: token width D.
        depth: blocks, encoder (N1) and decoder (N2) together.
        num_heads: attention heads.
        mlp_ratio: width of the MLP over D.
        num_classes: classes; label `num_classes` is the null label.
        class_dropout_prob: above 0, the null label has a row (the loss step drops the labels, not the model).
        decode_layer: N2, the last blocks, which see all tokens.
    Raises ValueError if patches do not tile the latent or decode_layer is not in [1, depth].
    """

    @register_to_config
    def __init__(self, input_size: int = 32, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 384,
                 depth: int = 12, num_heads: int = 6, mlp_ratio: float = 4.0, num_classes: int = 1000,
                 class_dropout_prob: float = 0.1, decode_layer: int = 2):
        super().__init__()
        side = layers.check_latent_shape(input_size, patch_size)
        if not 1 <= decode_layer <= depth:
            raise ValueError(f"decode_layer = {decode_layer}: must be between 1 and depth = {depth}")
        num_relative_positions = (2 * side - 1) ** 2
        block = (hidden_size, num_heads, mlp_ratio, num_relative_positions)
        self.x_embedder = layers.PatchEmbed(in_channels, patch_size, hidden_size)
        self.t_embedder = layers.TimestepEmbedder(hidden_size)
        self.y_embedder = layers.LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.empty(1, side * side, hidden_size))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, side * side, hidden_size))
        self.mask_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.blocks = nn.ModuleList(layers.Block(*block) for _ in range(depth))
        self.sideblocks = nn.ModuleList([layers.Block(*block)])
        self.final_layer = layers.FinalLayer(hidden_size, patch_size, 2 * in_channels)
        self.register_buffer("relative_position_index", layers.relative_position_index(side), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation (paper section 5.1: as DiT)."""
        side = self.config.input_size // self.config.patch_size
        self.apply(layers.init_linear)
        layers.init_embedders(self)
        for positions in (self.pos_embed, self.decoder_pos_embed):
            positions.data.copy_(layers.sincos_positions(self.config.hidden_size, side))
        nn.init.normal_(self.mask_token, std=0.02)
        for block in (*self.blocks, *self.sideblocks, self.final_layer):
            block.init_zero()

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, mask: Mask | None = None) -> torch.Tensor:
        """Predict noise and variance.

        Args:
            x: noisy latents (B, C, h, w).
            t: timesteps (B,), 0..999.
            y: labels (B,), 0..num_classes.
            mask: kept tokens of the masked pass; None is the full pass, as at inference.
        Returns: (B, 2C, h, w). Raises ValueError for wrong shapes.
        """
        layers.check_inputs(self, x, t, y)
        num_encoder = self.config.depth - self.config.decode_layer
        positions = self.relative_position_index  # (L, L)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        x = self.x_embedder(x) + self.pos_embed  # (B, L, D)
        encoder_positions = positions
        if mask is not None:
            x = mask.keep(x)  # (B, K, D)
            encoder_positions = mask.pairs(positions)  # (B, K, K)
        for block in self.blocks[:num_encoder]:
            x = block(x, c, encoder_positions)  # (B, K, D)
        x = self.interpolate(x, c, mask)  # (B, L, D)
        for block in self.blocks[num_encoder:]:
            x = block(x, c, positions)  # (B, L, D)
        x = self.final_layer(x, c)  # (B, L, p p 2C)
        return layers.unpatchify(x, self.config.input_size // self.config.patch_size, self.config.patch_size)

    def interpolate(self, x: torch.Tensor, c: torch.Tensor, mask: Mask | None) -> torch.Tensor:
        """Encoder output to decoder input, (B, K, D) -> (B, L, D): the side-interpolator and its masked shortcut.

        Hidden tokens take the interpolator's prediction, kept tokens pass through with their position added (the paper's
        text; its formula has the two swapped).
        """
        if mask is None:
            return x + self.decoder_pos_embed
        x = mask.restore(x, self.mask_token) + self.decoder_pos_embed  # (B, L, D)
        predicted = x
        for block in self.sideblocks:
            predicted = block(predicted, c, self.relative_position_index)  # (B, L, D)
        return torch.where(mask.hidden[:, :, None], predicted, x)
