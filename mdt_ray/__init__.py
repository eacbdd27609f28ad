"""mdt_ray: train and evaluate Masked Diffusion Transformers (arXiv 2303.14389) with Ray, from a laptop to a cluster."""

__version__ = "0.1.0"
