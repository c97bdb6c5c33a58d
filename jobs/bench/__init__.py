"""Benchmarks: each prints its table, judges its goals, and writes JSON and a figure."""
