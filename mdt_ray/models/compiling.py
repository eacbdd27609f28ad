"""torch.compile of a model's repeated blocks, each by itself: all blocks of one kind share what is compiled for a shape.

Not of the whole model: DDP could then send gradients only when the backward pass is done, or would cut the graph where its
buckets end; and every position of a block would be compiled anew.
"""

import torch

from mdt_ray.models.dit import DiT
from mdt_ray.models.mdt import MDT

MAX_SHAPES = 4096
"""Compilations of blocks: more than any run has. Where the mask ratio is drawn for every step, each number of kept tokens is
one (7 multiples of 8 lie between ratios of 0.3 and 0.5 of 256 tokens), for blocks with and without a long skip, and for
every size of micro-batch. PyTorch's limit of 8 would end the run."""


def compile_blocks(model: MDT | DiT) -> None:
    """Compile in place, every shape when it first comes. Weights, their names and checkpoints stay as they are."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MAX_SHAPES
    torch._dynamo.config.optimize_ddp = False  # it would cut a block's graph at DDP's buckets
    model.compile_repeated_blocks(fullgraph=True, dynamic=False)
