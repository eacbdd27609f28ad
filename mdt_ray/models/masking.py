"""Which tokens the encoder sees in a masked pass (paper section 4.2). Not the filling-in: that is in mdt.py.

B batch, L tokens, K kept.
"""

from dataclasses import dataclass

import torch


def num_kept(length: int, ratio: float, multiple: int = 1) -> int:
    """Kept tokens K = int(L (1 - ratio)), rounded down to a `multiple` (but not below one of them).

    MDTv2 draws a ratio for every step; with K in a few sizes, every shape is compiled once and keys are aligned.
    Raises ValueError for a ratio outside [0, 1), or one that keeps no token.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio = {ratio!r}: must be in [0, 1)")
    # int() of the float product, as published: int(100 * (1 - 0.8)) is 19, not 20.
    kept = int(length * (1 - ratio))
    if kept == 0:
        raise ValueError(f"mask ratio = {ratio!r}: keeps none of {length} tokens; use a smaller ratio")
    return kept if kept < multiple else kept // multiple * multiple


@dataclass(frozen=True)
class Mask:
    """Kept tokens of each sample. `ids_keep` is in shuffled order; `ids_restore` undoes the shuffle."""

    ids_keep: torch.Tensor  # (B, K) int64
    ids_restore: torch.Tensor  # (B, L) int64

    @classmethod
    def from_noise(cls, noise: torch.Tensor, ratio: float, multiple: int = 1) -> "Mask":
        """Keep the K = num_kept(L, ratio, multiple) tokens of smallest noise.

        Args:
            noise: (B, L) float.
            ratio: share of hidden tokens, in [0, 1).
        Raises ValueError as num_kept.
        """
        kept = num_kept(noise.shape[1], ratio, multiple)
        ids_shuffle = noise.argsort(dim=1)  # (B, L)
        return cls(ids_keep=ids_shuffle[:, :kept], ids_restore=ids_shuffle.argsort(dim=1))

    @classmethod
    def from_hidden(cls, hidden: torch.Tensor) -> "Mask":
        """The mask of chosen hidden tokens, (B, L) bool. ValueError unless all samples hide equally many, and not all."""
        counts = hidden.sum(dim=1)
        if (counts != counts[0]).any() or counts[0] == hidden.shape[1]:
            raise ValueError(f"hidden tokens = {counts.tolist()} of {hidden.shape[1]}: must be as many in every sample, and "
                             "not all")
        ids_shuffle = hidden.to(torch.uint8).argsort(dim=1, stable=True)  # (B, L), kept tokens first
        return cls(ids_keep=ids_shuffle[:, :hidden.shape[1] - int(counts[0])], ids_restore=ids_shuffle.argsort(dim=1))

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

    def repeat(self, times: int) -> "Mask":
        """The masks of a batch that holds every sample `times` times, one batch after the other (as guidance does)."""
        return Mask(ids_keep=self.ids_keep.repeat(times, 1), ids_restore=self.ids_restore.repeat(times, 1))

    def pairs(self, table: torch.Tensor) -> torch.Tensor:
        """Rows and columns of the kept tokens of a (L, L) table: (B, K, K)."""
        return table[self.ids_keep[:, :, None], self.ids_keep[:, None, :]]


def sample_mask(batch: int, length: int, ratio: float, generator: torch.Generator | None = None) -> Mask:
    """A uniformly random Mask for `batch` samples of `length` tokens. Raises ValueError as Mask.from_noise."""
    device = generator.device if generator is not None else None
    return Mask.from_noise(torch.rand(batch, length, generator=generator, device=device), ratio)
