"""Formatting of numbers for display."""


def score_text(value: float) -> str:
    """A score with two decimals, or with three significant digits if it is small."""
    return f"{value:,.2f}" if abs(value) >= 1.0 else f"{value:.3g}"
