"""What people read: tables, figures, the report, MLflow pages, and the display of a running study."""
