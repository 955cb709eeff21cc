"""Optimizers, learning-rate schedules, moving averages, and the stacking of several seeds."""
