"""Masked Diffusion Transformer (arXiv 2303.14389, section 4.3), and its version 2 (MDTv2).

A DiT with learnable positions and relative position biases. In the masked pass of training the encoder sees only the kept
tokens, and the side-interpolator predicts the hidden ones for the decoder; without a mask the side-interpolator is skipped.

B batch, L tokens, K kept, D width, C latent channels, h x w latent size.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from mdt_ray.models import layers
from mdt_ray.models.masking import Mask

MASKINGS = ("asymmetric", "symmetric", "none")


class MDT(ModelMixin, ConfigMixin):
    """The denoiser eps, v = MDT(x_t, t, y); output channels are the noise, then the variance interpolation.

    Args:
        input_size: side of the latent, or (height, width), in latent pixels.
        patch_size: side of a token in latent pixels; must divide input_size.
        in_channels: latent channels C.
        hidden_size: token width D.
        depth: blocks, encoder (N1) and decoder (N2) together.
        num_heads: attention heads.
        mlp_ratio: width of the MLP over D.
        num_classes: classes; label `num_classes` is the null label. 0 makes an unconditional model, which takes no labels.
        class_dropout_prob: above 0, the null label has a row (the loss step drops the labels, not the model).
        decode_layer: N2, the last blocks, which see all tokens (paper Table 4); 0 puts the side-interpolator after all.
        long_skips: MDTv2. The first half of the encoder hands its outputs to the second half, last first, and every decoder
            block takes the embedded patches; each joins them with a linear layer of its own.
        masking: what the encoder sees in the masked pass (paper Table 5a): the kept tokens (asymmetric), or all of them with
            the hidden ones replaced by the mask token (symmetric). `none`: a model without a masked pass (Table 5d).
        num_side_blocks: blocks of the side-interpolator (Table 5b, 5f); with 0, the decoder gets the mask tokens themselves.
        masked_shortcut: kept tokens pass the side-interpolator unchanged (Table 5c).
        decoder_positions: add a position embedding before the side-interpolator, and before the decoder where there is none
            (Table 5g).
        learnable_positions: train the position embeddings (Table 5h); else they stay the sine-cosine table.
        relative_position_bias: bias of attention by relative position (Table 5i).
    Raises ValueError if patches do not tile the latent, decode_layer is not in [0, depth], or long skips meet an odd number
    of encoder blocks.
    """

    _no_split_modules: ClassVar = ["Block"]
    _repeated_blocks: ClassVar = ["Block"]
    _supports_gradient_checkpointing: ClassVar = True

    @register_to_config
    def __init__(self, input_size: int | tuple[int, int] = 32, patch_size: int = 2, in_channels: int = 4,
                 hidden_size: int = 384, depth: int = 12, num_heads: int = 6, mlp_ratio: float = 4.0,
                 num_classes: int = 1000, class_dropout_prob: float = 0.1, decode_layer: int = 2, long_skips: bool = False,
                 masking: Literal["asymmetric", "symmetric", "none"] = "asymmetric", num_side_blocks: int = 1,
                 masked_shortcut: bool = True, decoder_positions: bool = True, learnable_positions: bool = True,
                 relative_position_bias: bool = True):
        super().__init__()
        self.grid = layers.token_grid(input_size, patch_size)
        self.gradient_checkpointing = False
        num_encoder = depth - decode_layer
        if not 0 <= decode_layer <= depth:
            raise ValueError(f"decode_layer = {decode_layer}: must be between 0 and depth = {depth}")
        if masking not in MASKINGS:
            raise ValueError(f"masking = {masking!r}: must be one of {', '.join(map(repr, MASKINGS))}")
        if long_skips and num_encoder % 2:
            raise ValueError(f"decode_layer = {decode_layer}: long skips pair the encoder's blocks, so depth - decode_layer "
                             f"= {num_encoder} must be even")
        num_bias = layers.num_relative_positions(self.grid) if relative_position_bias else 0

        def blocks(num: int, num_without_skip: int) -> nn.ModuleList:
            return nn.ModuleList(
                layers.Block(hidden_size, num_heads, mlp_ratio, num_bias, skip=long_skips and i >= num_without_skip)
                for i in range(num))

        def add_positions(name: str, wanted: bool = True) -> None:
            table = layers.sincos_positions(hidden_size, self.grid) if wanted else None  # (1, L, D)
            if wanted and learnable_positions:
                self.register_parameter(name, nn.Parameter(table))
            else:
                self.register_buffer(name, table)

        self.x_embedder = layers.PatchEmbed(in_channels, patch_size, hidden_size)
        self.t_embedder = layers.TimestepEmbedder(hidden_size)
        self.y_embedder = layers.LabelEmbedder(num_classes, hidden_size, class_dropout_prob) if num_classes else None
        add_positions("pos_embed")
        add_positions("decoder_pos_embed", decoder_positions)
        self.mask_token = nn.Parameter(torch.empty(1, 1, hidden_size)) if masking != "none" else None
        self.blocks = blocks(depth, num_encoder // 2)
        num_side_blocks = num_side_blocks if masking != "none" else 0
        self.sideblocks = blocks(num_side_blocks, num_side_blocks)
        self.final_layer = layers.FinalLayer(hidden_size, patch_size, 2 * in_channels)
        index = layers.relative_position_index(self.grid) if relative_position_bias else None
        self.register_buffer("relative_position_index", index, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation (paper section 5.1: as DiT); positions start as the sine-cosine table."""
        self.apply(layers.init_linear)
        layers.init_embedders(self)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        for block in (*self.blocks, *self.sideblocks, self.final_layer):
            block.init_zero()

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None,
                mask: Mask | None = None) -> torch.Tensor:
        """Predict noise and variance.

        Args:
            x: noisy latents (B, C, h, w).
            t: timesteps (B,), 0..999.
            y: labels (B,), 0..num_classes; None in an unconditional model.
            mask: kept tokens of the masked pass; None is the full pass, as at inference.
        Returns: (B, 2C, h, w). Raises ValueError for wrong shapes, and for a mask where there is no masked pass.
        """
        self.check_inputs(x, t, y, mask)
        c = layers.condition(self, t, y)  # (B, D)
        patches = self.x_embedder(x) + self.pos_embed  # (B, L, D)
        x = self.encode(patches, self.modulations(c), mask)  # (B, K, D)
        x = self.interpolate(x, c, mask)  # (B, L, D)
        return self.decode(x, c, patches)

    def both_passes(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None, mask: Mask) -> torch.Tensor:
        """A full and a masked pass of `forward`; what has the same shape in both is done once, on a batch of both.

        Args:
            x, t, y: as in `forward`, of the full pass and then of the masked one: (2B, C, h, w), (2B,), (2B,).
            mask: kept tokens of the masked pass, of B samples.
        Returns: (2B, 2C, h, w). Raises ValueError as `forward`.
        """
        self.check_inputs(x, t, y, mask)
        c = layers.condition(self, t, y)  # (2B, D)
        patches = self.x_embedder(x) + self.pos_embed  # (2B, L, D)
        modulations = [both.chunk(2) for both in self.modulations(c)]  # N1 x 2 x (B, 6D)
        decoder_inputs = []
        for i, its_mask in enumerate((None, mask)):
            x = self.encode(patches.chunk(2)[i], [halves[i] for halves in modulations], its_mask)  # (B, K, D)
            decoder_inputs.append(self.interpolate(x, c.chunk(2)[i], its_mask))  # (B, L, D)
        return self.decode(torch.cat(decoder_inputs), c, patches)

    def check_inputs(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None, mask: Mask | None) -> None:
        """Raise ValueError for wrong shapes, and for a mask where there is no masked pass."""
        layers.check_inputs(self, x, t, y)
        if mask is not None and self.mask_token is None:
            raise ValueError("mask: this model has no masked pass (masking = 'none'); pass mask=None")

    @property
    def encoder(self) -> nn.ModuleList:
        """The first N1 blocks, which see the kept tokens only."""
        return self.blocks[:self.config.depth - self.config.decode_layer]

    def positions(self, mask: Mask | None = None) -> torch.Tensor | None:
        """Rows of the bias table of all pairs of tokens, (L, L), or of kept ones, (B, K, K); None where there is no bias."""
        index = self.relative_position_index
        return None if index is None else layers.aligned(index if mask is None else mask.pairs(index))

    def decode(self, x: torch.Tensor, c: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Decoder input (B, L, D) and embedded patches (B, L, D) to noise and variance, (B, 2C, h, w)."""
        positions = self.positions()
        for block in self.blocks[self.config.depth - self.config.decode_layer:]:
            x = layers.call(self, block, x, block.adaLN_modulation(c), positions, patches)  # (B, L, D)
        x = self.final_layer(x, c)  # (B, L, p p 2C)
        return layers.unpatchify(x, self.grid, self.config.patch_size)

    def modulations(self, c: torch.Tensor) -> list[torch.Tensor]:
        """What the condition (B, D) does in each block of the encoder: N1 x (B, 6D)."""
        return [block.adaLN_modulation(c) for block in self.encoder]

    def encode(self, x: torch.Tensor, modulations: Sequence[torch.Tensor], mask: Mask | None) -> torch.Tensor:
        """Embedded patches (B, L, D) through the encoder: the kept ones, (B, K, D), or all, (B, L, D). `modulations` are of
        each of its blocks, (B, 6D)."""
        positions = self.positions()
        if mask is not None and self.config.masking == "symmetric":
            x = torch.where(mask.hidden[:, :, None], self.mask_token + self.pos_embed, x)  # (B, L, D)
        elif mask is not None:
            x = mask.keep(x)  # (B, K, D)
            positions = self.positions(mask)
        skips = []
        for block, modulation in zip(self.encoder, modulations, strict=True):
            if block.skip_linear is not None:
                x = layers.call(self, block, x, modulation, positions, skips.pop())  # (B, K, D)
                continue
            x = layers.call(self, block, x, modulation, positions)  # (B, K, D)
            if self.config.long_skips:
                skips.append(x.view_as(x))  # else the innermost is its block's other input itself: one more case to compile
        return x

    def interpolate(self, x: torch.Tensor, c: torch.Tensor, mask: Mask | None) -> torch.Tensor:
        """Encoder output to decoder input, (B, K, D) -> (B, L, D): the side-interpolator and its masked shortcut.

        Hidden tokens take the interpolator's prediction, kept tokens pass through with their position added (the paper's
        text; its formula has the two swapped). Without a mask only the position is added.
        """
        if mask is not None and self.config.masking == "asymmetric":
            x = mask.restore(x, self.mask_token)  # (B, L, D)
        if self.decoder_pos_embed is not None:
            x = x + self.decoder_pos_embed
        if mask is None or not self.sideblocks:
            return x
        predicted, positions = x, self.positions()
        for block in self.sideblocks:
            predicted = layers.call(self, block, predicted, block.adaLN_modulation(c), positions)  # (B, L, D)
        return torch.where(mask.hidden[:, :, None], predicted, x) if self.config.masked_shortcut else predicted
