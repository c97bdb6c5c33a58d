"""Pairs of any form -> shuffled Parquet shards of small pictures; `job` tells how."""
