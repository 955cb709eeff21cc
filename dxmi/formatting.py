"""Formatting of numbers for display."""


def score_text(value: float) -> str:
    """Format a score with two decimals, or with three significant digits if its magnitude is below 1."""
    return f"{value:,.2f}" if abs(value) >= 1.0 else f"{value:.3g}"
