"""Parquet -> rows -> batches."""
