"""What the command `dxmi` exits with."""

OK, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130
"""Done; failed; refused because of what the user wrote; stopped by a signal."""
