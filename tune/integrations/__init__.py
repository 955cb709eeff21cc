"""MLflow and object storage."""
