"""Full float32 inside extractors, so that features do not depend on the card or on a setting made elsewhere.

Not the precision of training or sampling: those choose their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 or bfloat16 inside float32 convolutions and matrix products; the settings before come back after.

    TF32 has 10 bits of mantissa, and is cuDNN's default for convolutions.
    """
    backends = (torch.backends.cudnn.conv, torch.backends.mkldnn.conv,
                torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
