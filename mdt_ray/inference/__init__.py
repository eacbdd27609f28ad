"""What a trained model is used for: images, single or by the chunk, in diffusers' pipelines, and other people's weights."""
