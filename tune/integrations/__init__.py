"""Integrations with MLflow and object storage."""
