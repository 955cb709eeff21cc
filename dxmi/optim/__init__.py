"""Optimizers, learning-rate schedules, moving averages, and the joint training of several seeds."""
