"""Retrieval and zero-shot classification; evaluators yield (name, value) pairs."""
