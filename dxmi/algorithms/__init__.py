"""Algorithms that fine-tune a policy: one file each, `update()` from top to bottom."""
