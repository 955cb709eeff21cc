"""The Python API: `Sweep` and `Ablation`."""
