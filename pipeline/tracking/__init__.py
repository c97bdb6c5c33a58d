"""Metrics, plots and the MLflow tracker, the one place that knows mlflow."""
