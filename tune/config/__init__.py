"""The configs of sweeps and ablations, and the composition of files and overrides into them."""
