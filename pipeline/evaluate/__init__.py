"""Retrieval, zero-shot classification, probes and tasks: metrics, results, cases to look at."""
