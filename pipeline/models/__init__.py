"""The encoders, built on transformers."""
