"""Storage: atomic file writes, the cache, checkpoints, the run directory, provenance."""
