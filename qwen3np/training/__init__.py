"""Training: the backward pass, AdamW, the loop, and the recipe of the built-in checkpoint."""
