"""Learned critics: the energy E(x) and the value V(x, t)."""
