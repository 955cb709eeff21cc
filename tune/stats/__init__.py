"""Confidence intervals, tests, corrections for multiplicity, and sequential plans. Nothing here knows of studies."""
