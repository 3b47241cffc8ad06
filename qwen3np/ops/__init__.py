"""The seam below the model: the same few operations, several times."""
