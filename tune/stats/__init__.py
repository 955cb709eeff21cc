"""Confidence intervals, tests, corrections for multiplicity and sequential plans, independent of how studies run."""
