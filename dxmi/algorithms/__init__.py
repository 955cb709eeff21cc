"""Algorithms that fine-tune a policy, one per file; in each, `update` reads from top to bottom."""
