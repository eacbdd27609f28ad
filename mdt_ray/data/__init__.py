"""Images, latents, and the order in which training reads them. pyarrow and torch, no Ray."""
