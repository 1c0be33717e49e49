"""The VAE: in stages, in tiles, fixed for fp16, tiny, compiled."""
