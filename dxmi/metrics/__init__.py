"""Scores of generated samples. Images of different kinds have different features, and differently named scores."""
