"""Rewards of samples: higher is better. One file a reward, and one line in the registry."""
