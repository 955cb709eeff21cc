"""Presentation of results: tables, figures, the HTML report, MLflow pages, and the live display."""
