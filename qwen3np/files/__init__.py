"""Everything on disk: config.json, checkpoints, the Hub; untrusted files are read within limits."""
