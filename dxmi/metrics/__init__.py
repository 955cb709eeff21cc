"""Scores of generated samples. Scores from different features have different names."""
