"""Figures of samples, curves, densities and values."""
