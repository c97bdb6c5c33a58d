"""Contrastive losses; tensors in, a scalar and metrics out."""
