"""The number type in which networks compute, of training, sampling and encoding alike.

Not that of feature networks: they compute in full float32 (evaluation/precision.py).
"""

import torch


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bf16, or None for float32 (and for tf32, a mode of its products). `auto` takes bf16 where the hardware multiplies it
    natively."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else None
