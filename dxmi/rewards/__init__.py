"""Rewards of samples; higher is better. Each reward has a file and a line in the registry."""
