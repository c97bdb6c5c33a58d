"""Rows of image-text Parquet -> embeddings of a run, in bulk; `job` tells how."""
