"""What lies on disk: config.json, checkpoints, the Hub; strangers' files are read within limits."""
