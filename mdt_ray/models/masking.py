"""Which tokens the encoder sees in a masked pass (paper section 4.2). Not the filling-in: that is in mdt.py.

B batch, L tokens, K kept.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mask:
    """Kept tokens of each sample. `ids_keep` is in shuffled order; `ids_restore` undoes the shuffle."""

    ids_keep: torch.Tensor  # (B, K) int64
    ids_restore: torch.Tensor  # (B, L) int64

    @classmethod
    def from_noise(cls, noise: torch.Tensor, ratio: float) -> "Mask":
        """Keep the K = int(L (1 - ratio)) tokens of smallest noise.

        Args:
            noise: (B, L) float.
            ratio: share of hidden tokens, in [0, 1).
        Raises ValueError for a ratio outside [0, 1), or one that keeps no token.
        """
        if not 0 <= ratio < 1:
            raise ValueError(f"mask ratio = {ratio!r}: must be in [0, 1)")
        num_tokens = noise.shape[1]
        # int() of the float product, as published: int(100 * (1 - 0.8)) is 19, not 20.
        num_kept = int(num_tokens * (1 - ratio))
        if num_kept == 0:
            raise ValueError(f"mask ratio = {ratio!r}: keeps none of {num_tokens} tokens; use a smaller ratio")
        ids_shuffle = noise.argsort(dim=1)  # (B, L)
        return cls(ids_keep=ids_shuffle[:, :num_kept], ids_restore=ids_shuffle.argsort(dim=1))

    @property
    def hidden(self) -> torch.Tensor:
        """True where a token is hidden, (B, L) bool: the paper's M."""
        return self.ids_restore >= self.ids_keep.shape[1]

    def keep(self, tokens: torch.Tensor) -> torch.Tensor:
        """Select the kept tokens: (B, L, D) -> (B, K, D)."""
        return tokens.gather(1, self.ids_keep[:, :, None].expand(-1, -1, tokens.shape[2]))

    def restore(self, kept: torch.Tensor, mask_token: torch.Tensor) -> torch.Tensor:
        """Put kept tokens (B, K, D) back in place, with mask_token (1, 1, D) everywhere else: (B, L, D)."""
        batch, num_kept, width = kept.shape
        num_hidden = self.ids_restore.shape[1] - num_kept
        shuffled = torch.cat([kept, mask_token.to(kept.dtype).expand(batch, num_hidden, width)], dim=1)
        return shuffled.gather(1, self.ids_restore[:, :, None].expand(-1, -1, width))

    def pairs(self, table: torch.Tensor) -> torch.Tensor:
        """Rows and columns of the kept tokens of a (L, L) table: (B, K, K)."""
        return table[self.ids_keep[:, :, None], self.ids_keep[:, None, :]]


def sample_mask(batch: int, length: int, ratio: float, generator: torch.Generator | None = None) -> Mask:
    """A uniformly random Mask for `batch` samples of `length` tokens. Raises ValueError as Mask.from_noise."""
    device = generator.device if generator is not None else None
    return Mask.from_noise(torch.rand(batch, length, generator=generator, device=device), ratio)
