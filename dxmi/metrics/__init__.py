"""Scores of generated samples. Scores that are computed from different features have different names."""
