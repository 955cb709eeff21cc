"""Exit codes of `dxmi`."""

OK, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130
"""Success; failure; rejected input; stopped by a signal."""
