"""Sampling, scoring, and the training-free samplers that a policy is compared with."""
