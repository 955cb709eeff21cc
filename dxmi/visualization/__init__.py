"""Pictures of samples, curves, densities and values."""
