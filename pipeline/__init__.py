"""Gammaray: image-text pretraining on Ray with a contrastive loss that gathers no features."""
