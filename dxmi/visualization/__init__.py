"""Figures of samples, score curves, densities and values."""
