"""What a notebook imports: `Sweep` and `Ablation`."""
