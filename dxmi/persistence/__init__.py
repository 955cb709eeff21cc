"""What a run keeps on disk: files written atomically, the cache, checkpoints, the run directory, provenance."""
